"""Tiny models with which `probe` finds out what a runtime can take."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper

from trimtab.plugins import GLU, INT4_LINEAR, INT8_LINEAR, Op, add_node

K, N, BLOCK = 64, 32, 32
"""Sizes of every trial product: x [rows, K] times w [K, N], quantized in blocks of BLOCK along K."""

_TYPES = {2: TensorProto.INT2, 4: TensorProto.INT4, 8: TensorProto.INT8}
_OPSET = {2: 25, 4: 21, 8: 21}
_IR = {2: 13, 4: 10, 8: 10}


def blockwise(bits: int, *, signed: bool = False) -> tuple[onnx.ModelProto, np.ndarray]:
    """y = x · DequantizeLinear(w), w of signed `bits`-bit integers in blocks; and the dense w, [K, N] float32.

    Args:
        signed: whether half of the scales are negative.
    """
    rng = np.random.default_rng(bits)
    q = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), (K, N))
    scale = rng.uniform(0.5, 1.0, (K // BLOCK, N)).astype(np.float32)
    scale[:, ::2] *= -1 if signed else 1
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale"], ["w"], axis=0, block_size=BLOCK),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    weights = [helper.make_tensor("q", _TYPES[bits], q.shape, q.ravel()), numpy_helper.from_array(scale, "scale")]
    model = _model(nodes, weights, TensorProto.FLOAT, [("", _OPSET[bits])], _IR[bits])
    return model, (q * np.repeat(scale, BLOCK, axis=0)).astype(np.float32)


def half() -> onnx.ModelProto:
    """y = Gelu(x w), all in float16."""
    w = np.random.default_rng(0).normal(size=(K, N)).astype(np.float16)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Gelu", ["h"], ["y"])]
    return _model(nodes, [numpy_helper.from_array(w, "w")], TensorProto.FLOAT16, [("", 21)], 10)


def largest() -> tuple[onnx.ModelProto, int]:
    """y = x w in integers, with the largest weights of int8; and the value of each y for the largest x of uint8."""
    weights = [numpy_helper.from_array(np.full((K, N), 127, np.int8), "w")]
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, ["rows", K])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, ["rows", N])
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "trial", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), 255 * 127 * K


def int8_linear() -> tuple[onnx.ModelProto, int]:
    """y = Int8Linear(x, w) with the largest weights; and the value of each y for x = 255, which quantizes to 255."""
    parts: dict[str, np.ndarray] = {"weight": np.full((K, N), 127, np.int8), "weight_scale": np.ones(N, np.float32)}
    return _linear(INT8_LINEAR, parts), 255 * 127 * K


def int4_linear() -> tuple[onnx.ModelProto, int]:
    """y = Int4Linear(x, w) with the largest weights; and the value of each y for x = 127, which quantizes to 127."""
    parts: dict[str, np.ndarray] = {
        "weight": np.full((N, K // 2), 0xFF, np.uint8),
        "weight_scale": np.ones((N, K // BLOCK), np.float32),
    }
    return _linear(INT4_LINEAR, parts), 127 * 7 * K


def glu() -> tuple[onnx.ModelProto, int]:
    """y = Glu(x) with ReLU; and the value of each y for x = 2."""
    graph = gs.Graph(inputs=[gs.Variable("x", np.float32, ["rows", K])], opset=21, ir_version=10)
    graph.outputs = [add_node(graph, GLU, {"x": graph.inputs[0]}, "y", activation="relu")]
    return gs.export_onnx(graph), 4


def counted() -> onnx.ModelProto:
    """y [counted, K]: row i of x once for each nonzero element in row i."""
    nodes = [
        helper.make_node("NonZero", ["x"], ["places"]),
        helper.make_node("Gather", ["places", "first"], ["rows"]),
        helper.make_node("Gather", ["x", "rows"], ["y"]),
    ]
    first = numpy_helper.from_array(np.array(0), "first")
    return _model(nodes, [first], TensorProto.FLOAT, [("", 21)], 10, columns=K)


def _linear(op: Op, parts: dict[str, np.ndarray]) -> onnx.ModelProto:
    graph = gs.Graph(inputs=[gs.Variable("x", np.float32, ["rows", K])], opset=21, ir_version=10)
    constants = {name: gs.Constant(name, array) for name, array in (parts | {"bias": np.zeros(N, np.float32)}).items()}
    graph.outputs = [add_node(graph, op, {"x": graph.inputs[0], **constants}, "y")]
    return gs.export_onnx(graph)


def _model(
    nodes: list[onnx.NodeProto],
    weights: list[onnx.TensorProto],
    dtype: int,
    opsets: list[tuple[str, int]],
    ir: int,
    *,
    columns: int = N,
) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", dtype, ["rows", K])
    y = helper.make_tensor_value_info("y", dtype, [None, columns])
    graph = helper.make_graph(nodes, "trial", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(*opset) for opset in opsets], ir_version=ir)
