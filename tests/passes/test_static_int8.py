"""int8 products with scales from calibration: errors of eight bits, and pairs that runtimes know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from rewrite import canonical, profile_of, run_part, session
from seeds import seeded
from zoo import exported, feeds

from trimtab.passes import PassContext, run_passes
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.errors import PassError
from trimtab.passes.graph import save_graph
from trimtab.passes.sampled_ffn import sample_ffn
from trimtab.passes.static_int8 import StaticInt8


def quantized(graph: Any, **options: Any) -> Any:
    (result,) = run_passes(graph, [StaticInt8.model_validate(options)], PassContext(profile_of(graph)))
    return result


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5"])
def test_an_ffn_computes_with_the_error_of_eight_bits(tmp_path: Path, family: str) -> None:
    graph = canonical(exported(family))
    profile = profile_of(graph)
    ffn = find_anatomy(graph).ffns[-1]
    layer = sample_ffn(ffn, profile)
    x, y = ffn.x.name, ffn.y.name
    states = layer.held_out[None, :40]
    want = run_part(graph, x, y, states, tmp_path)
    (result,) = run_passes(graph, [StaticInt8()], PassContext(profile))
    assert result.changed == len(find_anatomy(canonical(exported(family))).ffns)
    tensors = graph.tensors()
    name = f"static-int8/layer.{ffn.layer}/down"
    new = next(n for n in (y, f"{name}/shift", name) if n in tensors and tensors[n].inputs)
    got = run_part(graph, x, new, states, tmp_path)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 1e-4 < error < 0.05


def test_runtimes_multiply_integers(tmp_path: Path) -> None:
    graph = canonical(exported("bert"))
    quantized(graph)
    save_graph(graph, tmp_path / "m.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"])
    import onnx

    ops = [node.op_type for node in onnx.load(str(tmp_path / "optimised.onnx")).graph.node]
    assert sum(op in ("QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "QGemm") for op in ops) >= 6


def test_no_layers_change_nothing(tmp_path: Path) -> None:
    graph = canonical(exported("bert"))
    save_graph(graph, tmp_path / "a.onnx")
    assert quantized(graph, layers=()).changed == 0
    save_graph(graph, tmp_path / "b.onnx")
    given = feeds("bert", 2, 7, seeded())
    np.testing.assert_array_equal(*(session(tmp_path / f"{name}.onnx").run(None, given)[0] for name in "ab"))


def test_quantized_weights_are_left_with_the_reason() -> None:
    graph = canonical(exported("bert"))
    quantized(graph)
    result = quantized_again(graph)
    assert result.changed == 0 and all("quantized already" in left.why for left in result.left)


def quantized_again(graph: Any) -> Any:
    (result,) = run_passes(graph, [StaticInt8()], PassContext(profile_of(graph)))
    return result


def test_it_needs_a_profile() -> None:
    with pytest.raises(PassError, match="a profile is needed"):
        run_passes(canonical(exported("bert")), [StaticInt8()], PassContext())


def test_tensorrt_takes_it_in_half_too(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from trimtab.compiler.targets import get_target
    from trimtab.compiler.workload import Workload
    from trimtab.passes.precision import Precision

    graph = canonical(exported("bert"))
    context = PassContext(profile_of(graph), capability=get_target("tensorrt-rtx").probe())
    run_passes(graph, [StaticInt8(), Precision()], context)
    save_graph(graph, tmp_path / "m.onnx")
    workload = Workload(batch=(1, 2, 4), tokens=(1, 8, 16))
    _, info = get_target("tensorrt-rtx").build(tmp_path / "m.onnx", workload, tmp_path / "engine")
    assert '"INT8"' in info.read_text() and '"HALF"' in info.read_text()
