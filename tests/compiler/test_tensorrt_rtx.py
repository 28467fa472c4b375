"""TensorRT-RTX engines, really built, without a GPU; and the ways in which a build can fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import zoo
from onnx import TensorProto, helper, numpy_helper

from trimtab.compiler.targets import child, get_target, trials
from trimtab.compiler.targets.tensorrt import target
from trimtab.compiler.workload import Workload
from trimtab.passes.errors import TargetError
from trimtab.plugins.driver import gpu_present

pytest.importorskip("tensorrt_rtx")

SIZES = Workload(batch=(1, 2, 4), tokens=(4, 8, 16))


def save(path: Path, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray] | None = None) -> Path:
    """A graph over x [batch, 64], with every tensor that nobody reads as an output."""
    read = {name for node in nodes for name in node.input}
    outputs = [name for node in nodes for name in node.output if name not in read]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def relu(path: Path) -> Path:
    return save(path, [helper.make_node("Relu", ["x"], ["y"])])


def swap_child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let the child be a Python process that runs `code`."""
    monkeypatch.setattr(child, "command", lambda job, answer: [sys.executable, "-c", code, str(job), str(answer)])


def assert_nothing_left(out: Path) -> None:
    assert not out.exists() or not list(out.iterdir())


def test_an_engine_says_what_it_is(tmp_path: Path) -> None:
    model = save(
        tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": np.ones((64, 32), np.float32)}
    )
    files = get_target("tensorrt-rtx").build(model, SIZES, tmp_path / "engine")
    assert sorted(file.name for file in files) == sorted(file.name for file in (tmp_path / "engine").iterdir())
    engine, info = files
    assert engine.stat().st_size > 64 * 32 * 4
    said = json.loads(info.read_text())
    assert said["target"] == "tensorrt-rtx" and said["library"] == "tensorrt_rtx" and said["version"]
    assert said["precisions"] == ["FLOAT"]
    (engine,) = said["engines"]
    assert engine["file"] == "model.engine"
    assert engine["profiles"] == [{"name": "all", "shapes": {"x": [[1, 64], [2, 64], [4, 64]]}}]
    assert engine["inputs"] == [{"name": "x", "dtype": "float", "shape": [-1, 64]}]
    assert engine["outputs"] == [{"name": "y", "dtype": "float", "shape": [-1, 32]}]


@pytest.mark.parametrize("bits", [8, 4])
def test_blockwise_integer_weights_are_built(tmp_path: Path, bits: int) -> None:
    model, _ = trials.blockwise(bits)
    onnx.save(model, tmp_path / "m.onnx")
    engine, info = get_target("tensorrt-rtx").build(tmp_path / "m.onnx", SIZES, tmp_path / "engine")
    assert engine.stat().st_size > 0
    assert f"INT{bits}" in json.loads(info.read_text())["precisions"]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_transformers_are_built(tmp_path: Path, family: str) -> None:
    engine, info = get_target("tensorrt-rtx").build(zoo.exported(family), SIZES, tmp_path / "engine")
    weights = sum(p.numel() for p in zoo.tiny_model(family).parameters())
    assert engine.stat().st_size > 2 * weights
    (profile,) = json.loads(info.read_text())["engines"][0]["profiles"]
    assert profile["shapes"]["input_ids"] == [[1, 4], [2, 8], [4, 16]] == profile["shapes"]["attention_mask"]


def test_external_weights_reach_the_engine(tmp_path: Path) -> None:
    w = np.random.default_rng(0).normal(size=(64, 1024)).astype(np.float32)
    path = save(tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": w})
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.data")
    engine, _ = get_target("tensorrt-rtx").build(path, SIZES, tmp_path / "engine")
    assert engine.stat().st_size > w.nbytes
    (tmp_path / "w.data").write_bytes(b"")
    with pytest.raises(Exception, match=r"w\.data holds 0 bytes"):
        get_target("tensorrt-rtx").build(path, SIZES, tmp_path / "other")


def test_refused_nodes_are_all_named_before_anything_is_built(tmp_path: Path) -> None:
    model = save(
        tmp_path / "m.onnx",
        [
            helper.make_node("Relu", ["x"], ["h"], name="fine"),
            helper.make_node("Unique", ["h"], ["y"], name="layer.0/unique"),
            helper.make_node("Inverse", ["h"], ["z"], name="layer.1/inverse", domain="com.microsoft"),
            helper.make_node("Det", ["h"], ["c"], name="layer.2/det"),
        ],
    )
    with pytest.raises(TargetError, match=r"(?s)Unique 'layer.0/unique'.*::Inverse 'layer.1/inverse'.*Det") as caught:
        get_target("tensorrt-rtx").build(model, SIZES, tmp_path / "engine")
    assert "fine" not in str(caught.value)
    assert_nothing_left(tmp_path / "engine")


def test_an_op_that_only_shares_its_name_with_a_standard_one_is_refused(tmp_path: Path) -> None:
    """The parser sees names alone: it would compute a Relu."""
    odd = save(tmp_path / "odd.onnx", [helper.make_node("Relu", ["x"], ["y"], name="odd", domain="com.microsoft")])
    fine = save(tmp_path / "fine.onnx", [helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")])
    [relu], gelu = target.TensorRTRTX().parse([odd, fine])
    assert (relu["op"], relu["node"]) == ("com.microsoft::Relu", "odd") and "same name" in relu["reason"]
    assert not gelu


def test_a_type_the_parser_lacks_is_refused(tmp_path: Path) -> None:
    onnx.save(trials.blockwise(2)[0], tmp_path / "m.onnx")
    with pytest.raises(TargetError, match=r"(?s)does not take this graph.*initializer"):
        get_target("tensorrt-rtx").build(tmp_path / "m.onnx", SIZES, tmp_path / "engine")
    assert_nothing_left(tmp_path / "engine")


def test_the_probe_tells_what_the_parser_takes() -> None:
    capability = get_target("tensorrt-rtx").probe()
    assert capability.weight_bits == {4, 8} and capability.float16 and capability.counted_sizes


def test_a_crash_of_the_builder_is_an_error_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = relu(tmp_path / "m.onnx")
    swap_child(
        monkeypatch,
        "import json, os, sys; print('converting layer 3', file=sys.stderr, flush=True);"
        "open(json.load(open(sys.argv[1]))['build']['engines'][0], 'w').write('half an engine'); os.abort()",
    )
    with pytest.raises(TargetError, match=r"(?s)tensorrt-rtx: the builder crashed \(SIGABRT\).*converting layer 3"):
        get_target("tensorrt-rtx").build(model, SIZES, tmp_path / "engine")
    assert_nothing_left(tmp_path / "engine")


def test_a_failure_of_the_builder_is_an_error_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = relu(tmp_path / "m.onnx")
    swap_child(monkeypatch, "raise SystemExit('no memory for tactic 7')")
    with pytest.raises(TargetError, match=r"(?s)the builder failed \(exit code 1\).*no memory for tactic 7"):
        get_target("tensorrt-rtx").build(model, SIZES, tmp_path / "engine")
    assert_nothing_left(tmp_path / "engine")


def test_a_refusal_of_the_builder_is_shown_without_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much Python says behind it; a fault before the builder was asked is the exception's message."""
    model = relu(tmp_path / "m.onnx")
    fail = "try: raise {}\nexcept Exception:\n import traceback; traceback.print_exc(); raise SystemExit(1)"
    refusal = "[E] IBuilder: Error Code 4: layer 7 has no kernel"
    swap_child(monkeypatch, f"print('{refusal}\\n' * 2, flush=True)\n" + fail.format("RuntimeError('Invalid Engine')"))
    with pytest.raises(TargetError) as first:
        get_target("tensorrt-rtx").build(model, SIZES, tmp_path / "engine")
    assert first.value.message.splitlines()[1:] == ["  IBuilder: Error Code 4: layer 7 has no kernel"]
    assert "precision" in (first.value.hint or "")
    swap_child(monkeypatch, fail.format("OSError('no such plugin')"))
    with pytest.raises(TargetError) as second:
        get_target("tensorrt-rtx").build(model, SIZES, tmp_path / "engine")
    assert second.value.message.splitlines()[1:] == ["  no such plugin"]


def test_a_builder_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = relu(tmp_path / "m.onnx")
    swap_child(monkeypatch, "import time; print('timing tactics', flush=True); time.sleep(60)")
    with pytest.raises(TargetError, match=r"(?s)gave up building after 3 s.*timing tactics"):
        get_target("tensorrt-rtx").build(model, SIZES, tmp_path / "engine", timeout_s=3)
    assert_nothing_left(tmp_path / "engine")


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = relu(tmp_path / "m.onnx")

    def interrupted(name: str, job: dict[str, Any], **_: object) -> None:
        Path(job["build"]["engines"][0]).write_text("half an engine")
        raise KeyboardInterrupt

    monkeypatch.setattr(target, "run_child", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get_target("tensorrt-rtx").build(model, SIZES, tmp_path / "engine")
    assert_nothing_left(tmp_path / "engine")


def test_an_output_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    model = relu(tmp_path / "m.onnx")
    (tmp_path / "engine").write_text("a file where the folder should be")
    with pytest.raises(TargetError, match="cannot write the engine"):
        get_target("tensorrt-rtx").build(model, SIZES, tmp_path / "engine")


@pytest.mark.skipif(gpu_present(), reason="a GPU is present")
def test_opening_needs_a_gpu_and_says_so(tmp_path: Path) -> None:
    get_target("tensorrt-rtx").build(relu(tmp_path / "m.onnx"), SIZES, tmp_path / "engine")
    with pytest.raises(TargetError, match="runs on an NVIDIA GPU, and this machine has none"):
        get_target("tensorrt-rtx").open(tmp_path)


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_a_missing_library_is_refused_at_once_with_the_install_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(target.importlib.util, "find_spec", lambda package: None)
    missing = get_target(name)
    for attempt in (
        missing.probe,
        lambda: missing.build(tmp_path / "m.onnx", SIZES, tmp_path / "engine"),
        lambda: missing.open(tmp_path),
    ):
        with pytest.raises(TargetError, match=r"not installed here.*pip install") as caught:
            attempt()
        assert f"trimtab[{name}]" in str(caught.value)
    assert_nothing_left(tmp_path / "engine")
