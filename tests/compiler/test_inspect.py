"""`trimtab inspect`: the JSON that scripts read, and the text that people read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import tiny
import zoo

from trimtab.compiler import inspect_model
from trimtab.compiler.inspect import cost_rows, describe, gain_lines, summary
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.canonicalize import Canonicalize
from trimtab.passes.contract import PassContext
from trimtab.passes.errors import InputError
from trimtab.passes.graph import load_graph


def found(family: str, exporter: str = "dynamo", tokens: int = 128) -> dict:
    graph = load_graph(zoo.exported(family, exporter))
    Canonicalize().run(graph, PassContext())
    return describe(find_anatomy(graph), tokens=tokens)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trimtab.compiler.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_keys() -> None:
    report = found("llama")
    required = {"family", "layers", "ffn", "attention", "head", "embeddings", "params", "unrecognized"}
    assert required <= set(report)
    assert set(report["ffn"][0]) == {"layer", "gated", "activation", "d_model", "d_ff", "params"}
    assert report["ffn"][1] == {
        "layer": 1, "gated": True, "activation": "silu", "d_model": 64, "d_ff": 108, "params": 3 * 64 * 108,
    }  # fmt: skip
    assert report["head"]["tied"] is False
    json.dumps(report, allow_nan=False)


def test_costs_of_llama() -> None:
    """Counted by hand: 2 layers, d 64, FFN 108, 4 heads of 16, 2 of them for keys and values, vocabulary 131."""
    tokens = 50
    parts = {part["part"]: part for part in found("llama", tokens=tokens)["parts"]}
    ffn = 2 * 3 * 64 * 108
    attention = 2 * (64 * 64 * 2 + 64 * 32 * 2)
    assert (parts["FFN"]["params"], parts["FFN"]["flops_per_token"], parts["FFN"]["bytes_per_token"]) == (
        ffn,
        2 * ffn,
        4 * ffn,
    )
    assert parts["attention"]["params"] == attention
    assert parts["attention"]["flops_per_token"] == 2 * attention + 2 * 4 * tokens * 64
    assert parts["head"]["flops_per_token"] == 2 * 64 * 131
    assert parts["embeddings"]["bytes_per_token"] == 64 * 4
    assert sum(part["params"] for part in parts.values()) == found("llama")["params"]


def test_a_classifier_head_works_once_per_text() -> None:
    head = next(part for part in found("bert", tokens=100)["parts"] if part["part"] == "head")
    assert head["flops_per_token"] == round(2 * (48 * 48 + 48 * 3) / 100)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_gains_are_amdahls(family: str) -> None:
    report = found(family)
    for key, what in (("flops_per_token", "flops"), ("bytes_per_token", "bytes")):
        total = sum(part[key] for part in report["parts"])
        rest = total - report["parts"][0][key]
        gain = report["gains"][what]
        assert gain["free"] == pytest.approx(total / rest)
        assert gain["heavy_25"] == pytest.approx(total / (rest + 0.25 * report["parts"][0][key]))
    assert len(cost_rows(report)) == 5
    assert len(gain_lines(report)) == 2
    assert family[:3] in summary(report) or family in ("roberta", "distilbert")


def test_command() -> None:
    path = zoo.exported("gpt2", "torchscript")
    as_json = run("inspect", path, "--json")
    assert as_json.returncode == 0, as_json.stderr
    report = json.loads(as_json.stdout)
    assert (report["family"], report["layers"], len(report["ffn"])) == ("gpt2", 2, 2)
    text = run("inspect", path)
    assert text.returncode == 0
    assert "gpt2: 2 layers" in text.stdout
    assert "FFNs are" in text.stdout


def test_what_is_not_recognised_is_said(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["" : 18]>
        agraph (float[N, 4] x) => (float[N, 4] y) {
            a = MatMul (x, u) b = Mul (a, s) c = Relu (b) d = MatMul (c, v) y = Add (d, x)
        }""")
    for name, shape in (("u", (4, 6)), ("s", (6,)), ("v", (6, 4))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    model.graph.node[1].name = "the scale"
    onnx.save(model, tmp_path / "model.onnx")
    text = run("inspect", tmp_path / "model.onnx")
    assert text.returncode == 0
    assert "No FFN was found" in text.stdout
    assert "not recognised: FFN at node the scale: Mul with a constant of 6 values" in text.stdout
    report = json.loads(run("inspect", tmp_path / "model.onnx", "--json").stdout)
    assert report["unrecognized"][0]["where"] == "the scale"
    assert report["head"] is None


@pytest.mark.parametrize("tokens", [0, -1, 1.5, "8", None])
def test_counts_of_no_tokens(tmp_path: Path, tokens: Any) -> None:
    with pytest.raises(InputError, match="not an integer of at least 1"):
        inspect_model(tiny.model(tmp_path / "model.onnx"), tokens=tokens)


def test_bad_input(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("this is no model")
    for path in (tmp_path / "model.onnx", tmp_path / "absent.onnx"):
        result = run("inspect", path, "--json")
        assert result.returncode == 1
        assert result.stdout == ""
        assert str(path) in result.stderr
        assert "Traceback" not in result.stderr
