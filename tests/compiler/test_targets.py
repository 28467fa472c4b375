"""ONNX Runtime as a target: what it can take, opening, running, and what it refuses."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from seeds import seeded

from trimtab.compiler.checks.cost import Counter
from trimtab.compiler.targets import TARGET_NAMES, Target, get_target, kernels, onnxruntime, sessions, trials
from trimtab.compiler.targets.base import MODEL
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner, session_options, uses_dialect
from trimtab.compiler.workload import Workload
from trimtab.passes.errors import TargetError
from trimtab.plugins import KEEP_SAMPLES, add_multi_output_node


def linear(folder: Path, rng: np.random.Generator, *, op: str = "MatMul", domain: str = "") -> np.ndarray:
    """Write y = x w, with w in external data, as a build directory's model; returns w, [24, 40]."""
    w = rng.normal(size=(24, 40)).astype(np.float32)
    node = helper.make_node(op, ["x", "w"], ["y"], name="the/product", domain=domain)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 24])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 40])
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(w, "w")])
    opsets = [helper.make_opsetid("", 21), *([helper.make_opsetid(domain, 1)] if domain else [])]
    (folder / MODEL).parent.mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, folder / MODEL, save_as_external_data=True, location="w.data", size_threshold=0)
    return w


def test_every_target_can_be_had_by_name_and_an_unknown_one_names_the_nearest() -> None:
    for name in TARGET_NAMES:
        target = get_target(name)
        assert isinstance(target, Target) and target.name == name and target.summary
    with pytest.raises(TargetError, match=r"'onnxruntim'.*did you mean 'onnxruntime'"):
        get_target("onnxruntim")
    with pytest.raises(TargetError, match="known targets: onnxruntime"):
        get_target("vulkan")


@pytest.mark.parametrize("batch", [1, 7])
def test_build_and_open_compute_the_graph(tmp_path: Path, batch: int) -> None:
    rng = seeded()
    w = linear(tmp_path, rng)
    target = get_target("onnxruntime")
    assert target.build(tmp_path / MODEL, Workload(), tmp_path / "engine") == []
    runner = target.open(tmp_path, threads=1)
    assert (runner.inputs, runner.outputs) == (("x",), ("y",))
    x = rng.normal(size=(batch, 24)).astype(np.float32)
    np.testing.assert_allclose(runner.run({"x": x})["y"], x.astype(float) @ w, rtol=1e-4, atol=1e-4)


def exiting(folder: Path) -> onnx.ModelProto:
    """Samples that stay, of a packed batch."""
    shapes = {"uncertainty": ["batch"], "threshold": ["batch"], "offsets": ["starts"], "x": ["rows", 3]}
    types = {"offsets": np.int32}
    given = {name: gs.Variable(name, types.get(name, np.float32), shape) for name, shape in shapes.items()}
    graph = gs.Graph(inputs=list(given.values()), opset=21, ir_version=10)
    graph.outputs = list(add_multi_output_node(graph, KEEP_SAMPLES, given, "exit"))
    model = gs.export_onnx(graph)
    onnx.save(model, folder / "model.onnx")
    return model


@pytest.mark.parametrize("part", ["input", "output", "attribute"])
def test_the_dialect_of_another_version_is_refused(part: str, tmp_path: Path) -> None:
    """By what its bodies take and give, which the kernels of today may misread."""
    model = exiting(tmp_path)
    assert uses_dialect(tmp_path / "model.onnx") and OnnxRuntimeRunner(tmp_path / "model.onnx").inputs
    (keep,) = [function for function in model.functions if function.name == "KeepSamples"]
    getattr(keep, part).append("leave")
    onnx.save(model, tmp_path / "old.onnx")
    for opens in (OnnxRuntimeRunner, Counter, uses_dialect):
        with pytest.raises(
            TargetError, match=r"old\.onnx: was compiled by another version.* KeepSamples .*compile it again"
        ):
            opens(tmp_path / "old.onnx")


def test_kernels_of_another_version(tmp_path: Path) -> None:
    """As where a checkout is newer than its library."""
    model = exiting(tmp_path)
    model.graph.node[-1].output.append("leave")
    with pytest.raises(TargetError, match=r"KeepSamples.*native kernels are of another version"):
        OnnxRuntimeRunner(model.SerializeToString())


def test_sums_and_norms_stay_apart_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "providers", lambda: ["CPUExecutionProvider"])
    model = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["" : 18]>
        agraph (float[B, T, 8] x, float[B, T, 8] z) => (float[B, T, 8] y)
        <float[8] g = {1, 1, 1, 1, 1, 1, 1, 1}, float[8] b = {0, 0, 0, 0, 0, 0, 0, 0}> {
            s = Add (x, z)
            y = LayerNormalization <axis = -1> (s, g, b)
        }""")

    def made(options: ort.SessionOptions) -> list[str]:
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]

    assert made(ort.SessionOptions()) == ["SkipLayerNormalization"]  # what a session would do by itself
    assert made(session_options()) == ["Add", "LayerNormalization"]


def test_threads_and_spinning_reach_the_session(tmp_path: Path) -> None:
    linear(tmp_path, np.random.default_rng(0))
    runner = get_target("onnxruntime").open(tmp_path, threads=3)
    assert isinstance(runner, OnnxRuntimeRunner)
    options = runner.session.get_session_options()
    assert options.intra_op_num_threads == 3
    with pytest.raises(RuntimeError, match="does not have"):  # ONNX Runtime's default: threads spin
        options.get_session_config_entry("session.force_spinning_stop")
    assert session_options().get_session_config_entry("session.force_spinning_stop") == "1"
    assert session_options().intra_op_num_threads == 0


def test_what_the_runtime_lacks_is_refused_when_it_is_built(tmp_path: Path) -> None:
    linear(tmp_path, np.random.default_rng(0), op="Nonsense", domain="nowhere")
    with pytest.raises(TargetError, match=r"does not take this graph.*Nonsense"):
        get_target("onnxruntime").build(tmp_path / MODEL, Workload(), tmp_path / "engine")


def test_a_missing_or_broken_model_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"model\.onnx"):
        get_target("onnxruntime").open(tmp_path)
    (tmp_path / MODEL).parent.mkdir()
    (tmp_path / MODEL).write_bytes(b"not a model")
    with pytest.raises(TargetError, match=r"does not take this graph"):
        get_target("onnxruntime").open(tmp_path)


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"x": np.zeros((2, 23), np.float32)},
        {"x": np.zeros((2, 24), np.float64)},
        {"x": np.zeros(24, np.float32)},
        {"x": np.zeros((2, 24), np.float32), "z": np.zeros(1, np.float32)},
    ],
    ids=["missing", "size", "type", "rank", "unknown"],
)
def test_inputs_the_model_does_not_take_are_refused(tmp_path: Path, inputs: dict[str, np.ndarray]) -> None:
    linear(tmp_path, np.random.default_rng(0))
    runner = get_target("onnxruntime").open(tmp_path, threads=1)
    with pytest.raises(TargetError, match="could not run the model"):
        runner.run(inputs)


def test_the_probe_tells_what_trial_models_really_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every width that is claimed is multiplied as integers; a runtime that leaves the op alone claims none."""
    capability = get_target("onnxruntime").probe()
    assert 4 in capability.weight_bits
    x = seeded().normal(size=(5, trials.K)).astype(np.float32)
    assert capability.negative_scales
    for bits, signed in [*((bits, False) for bits in capability.weight_bits), (4, True)]:
        model, w = trials.blockwise(bits, signed=signed)
        session = onnxruntime.ort.InferenceSession(model.SerializeToString(), session_options(1))
        assert np.abs(session.run(None, {"x": x})[0] - x @ w).max() < 0.03 * np.abs(x @ w).max()

    def plain(threads: int | None = None) -> onnxruntime.ort.SessionOptions:
        options = session_options(threads)
        options.graph_optimization_level = onnxruntime.ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return options

    monkeypatch.setattr(kernels, "session_options", plain)
    without = onnxruntime._probe.__wrapped__()
    assert without.weight_bits == frozenset()
    assert not without.negative_scales


@pytest.mark.parametrize("wrong", ["all", "negative"])
def test_the_probe_sees_wrong_results(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def negated(bits: int, *, signed: bool = False) -> tuple[onnx.ModelProto, np.ndarray]:
        model, w = blockwise(bits, signed=signed)
        return model, -w if wrong == "all" or signed else w

    blockwise = trials.blockwise
    monkeypatch.setattr(trials, "blockwise", negated)
    found = onnxruntime._probe.__wrapped__()
    assert (found.weight_bits == frozenset()) == (wrong == "all")
    assert not found.negative_scales


@pytest.mark.skipif(platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="reads x86 flags")
def test_saturating_products_are_those_of_processors_without_vnni() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert get_target("onnxruntime").probe().saturates == flags.isdisjoint({"avx512_vnni", "avx_vnni"})
