"""Graphs of ONNX Runtime's optimizer, which name no types between their nodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper
from seeds import seeded

from trimtab.passes.canonicalize import Canonicalize
from trimtab.passes.canonicalize.shapes import infer_shapes
from trimtab.passes.contract import PassContext
from trimtab.passes.graph import load_graph, save_graph
from trimtab.passes.precision import Precision

WIDTH, HEADS, NEURONS, ROWS = 12, 3, 20, 30


def optimized(opset: int = 14) -> onnx.ModelProto:
    """An encoder of one layer as the optimizer fuses BERT: an int32 mask goes from op to op."""
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}, "com.microsoft": 1]> '
        f"g (int64[B, S] ids, int64[B, S] mask) => (float[B, S, {WIDTH}] y) {{ "
        "i = Cast <to = 6> (ids) m = Cast <to = 6> (mask) "
        "e, lengths = com.microsoft.EmbedLayerNormalization (i, , words, places, , g, b, m) "
        f"a = com.microsoft.Attention <num_heads = {HEADS}> (e, qkv, qkv_b, lengths) o = MatMul (a, out) "
        "s = com.microsoft.SkipLayerNormalization <epsilon = 0.001> (o, e, g, b, out_b) "
        "u = MatMul (s, up) h = com.microsoft.BiasGelu (u, up_b) d = MatMul (h, down) r = Add (d, s) "
        "y = LayerNormalization <axis = -1> (r, g, b) }"
    )
    rng = seeded()
    shapes = {
        "words": (ROWS, WIDTH), "places": (16, WIDTH), "g": (WIDTH,), "b": (WIDTH,), "qkv": (WIDTH, 3 * WIDTH),
        "qkv_b": (3 * WIDTH,), "out": (WIDTH, WIDTH), "out_b": (WIDTH,), "up": (WIDTH, NEURONS), "up_b": (NEURONS,),
        "down": (NEURONS, WIDTH),
    }  # fmt: skip
    for name, shape in shapes.items():
        array = rng.standard_normal(shape).astype(np.float32) * shape[0] ** -0.5
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_in_half_precision(tmp_path: Path, kind: str) -> None:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    onnx.save(optimized(), before)
    graph = load_graph(before)
    Canonicalize().run(graph, PassContext())
    result = Precision(type=kind).run(graph, PassContext())
    assert {"Attention", "SkipLayerNormalization", "MatMul", "LayerNormalization"} <= set(result.details["ops"])
    save_graph(graph, after)
    rng = seeded()
    mask = np.arange(7)[None] < np.array([[7], [3], [5]])
    feeds = {"ids": rng.integers(0, ROWS, (3, 7)), "mask": mask.astype(np.int64)}
    if kind == "bfloat16":  # for which ONNX Runtime's CPU provider lacks kernels; the types must be right all the same
        onnx.shape_inference.infer_shapes(onnx.load(after), check_type=True, strict_mode=True)
        return
    have, want = (
        ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for path in (after, before)
    )
    np.testing.assert_allclose(have, want, atol=2e-2)


def test_types_are_known_behind_the_runtimes_ops(tmp_path: Path) -> None:
    onnx.save(optimized(), tmp_path / "model.onnx")
    graph = load_graph(tmp_path / "model.onnx")
    Canonicalize().run(graph, PassContext())
    types = {name: tensor.dtype for name, tensor in graph.tensors().items()}
    assert types["lengths"] == np.int32
    assert all(types[name] == np.float32 for name in ("e", "a", "o", "s", "u", "d", "r"))
    assert graph.tensors()["s"].shape is None or graph.tensors()["s"].shape[-1] == WIDTH


def test_of_several_types_the_first_input_that_has_one_decides() -> None:
    """MatMulIntegerToFloat reads integers and puts out the type of its scales."""
    from trimtab.passes.canonicalize.runtime_schemas import register_runtime_schemas

    ops = [("com.microsoft", "MatMulIntegerToFloat", 1), ("com.microsoft", "no such op", 1), ("", "Relu", 14)]
    register_runtime_schemas(ops)
    register_runtime_schemas(ops)  # again does nothing
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 14, "com.microsoft": 1]> g (uint8[n, 4] x, int8[4, 5] w, float16 s) => '
        "(float16[n, 5] y) { p = com.microsoft.MatMulIntegerToFloat (x, w, s, s) y = Identity (p) }"
    )
    (found,) = [v for v in onnx.shape_inference.infer_shapes(model).graph.value_info if v.name == "p"]
    assert found.type.tensor_type.elem_type == TensorProto.FLOAT16


@pytest.mark.parametrize("op", ["com.microsoft.BiasGelu (h, b)", "LayerNormalization <axis = -1> (h, b, b)"])
def test_behind_an_op_of_another_domain(op: str) -> None:
    """Its output has no type, and what reads it takes its own from the other input."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 14, "com.microsoft": 1, "own": 1]> '
        f"g (float[N, 4] x, float[4] b) => (float[N, 4] y) {{ h = own.Foo (x) z = {op} y = Relu (z) }}"
    )
    graph = gs.import_onnx(model)
    infer_shapes(graph)
    types = {t.name: t.dtype for node in graph.nodes for t in node.outputs}
    assert types["z"] == np.float32
