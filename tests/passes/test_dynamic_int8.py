"""dynamic-int8 does to a compiled graph what ONNX Runtime's quantizer does to a dense one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import zoo

from trimtab.compiler.targets import get_target
from trimtab.passes import Capability, PassContext, run_passes
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.canonicalize import Canonicalize
from trimtab.passes.dynamic_int8 import DynamicInt8
from trimtab.passes.graph import load_graph, save_graph, values


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_products_become_integer_products(family: str, tmp_path: Path) -> None:
    path = zoo.exported(family)
    graph = load_graph(path)
    result = run_passes(
        graph, [Canonicalize(), DynamicInt8()], PassContext(capability=get_target("onnxruntime").probe())
    )[1]
    save_graph(graph, tmp_path / "int8.onnx")
    linears = [n for n in load_graph(tmp_path / "int8.onnx").nodes if n.op == "MatMulInteger"]
    assert result.changed == len(linears) > 0
    feeds = zoo.feeds(family, 3, 11, np.random.default_rng(0))
    dense, ours = (
        run.run(None, {i.name: feeds[i.name] for i in run.get_inputs()})[0]
        for run in (ort.InferenceSession(str(p)) for p in (path, tmp_path / "int8.onnx"))
    )
    error = np.linalg.norm(ours - dense) / np.linalg.norm(dense)
    assert 0 < error < 0.1


def test_ffn_bytes_are_those_of_its_integers(tmp_path: Path) -> None:
    graph = load_graph(zoo.exported("bert"))
    run_passes(graph, [Canonicalize()], PassContext())
    ffns = find_anatomy(graph).ffns
    weights = sum(linear.in_features * linear.out_features for ffn in ffns for linear in ffn.linears)
    told = run_passes(graph, [DynamicInt8()], PassContext())[0].details["ffn_bytes"]
    channels = sum(linear.out_features for ffn in ffns for linear in ffn.linears)
    assert told == weights + channels * (4 + 1 + 4)  # scale, zero point and bias per output feature


@pytest.mark.parametrize(("saturates", "largest"), [(False, 127), (True, 64)])
def test_weights_take_seven_bits_where_products_saturate(saturates: bool, largest: int) -> None:
    graph = load_graph(zoo.exported("bert"))
    run_passes(graph, [Canonicalize(), DynamicInt8()], PassContext(capability=Capability(saturates=saturates)))
    weights = [values(n.inputs[1]) for n in graph.nodes if n.op == "MatMulInteger"]
    assert max(np.abs(w.astype(int)).max() for w in weights) == pytest.approx(largest, abs=1)
