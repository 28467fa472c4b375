"""Products with int4 weights in blocks as the dialect's own op, whose native kernel reads them faster."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from trimtab.passes.graph import constant, output_name_of, topological, values
from trimtab.passes.graph.linear import Linear, match_linear
from trimtab.passes.graph.opset import raise_opset
from trimtab.passes.graph.weights import Derived, data_type
from trimtab.passes.matrices.forms import INTEGER_ACTIVATIONS
from trimtab.plugins import INT4_LINEAR, add_node
from trimtab.plugins.dialect import OPSET
from trimtab.plugins.int4_linear import BLOCK


def use_int4_linear(graph: gs.Graph) -> int:
    """Make an Int4Linear of each product whose int4 weights ONNX Runtime would multiply with bytes, in place.

    Integers and scales stay as they are; x is rounded by blocks of 32, which are ONNX Runtime's where it rounds by
    those of the weights. Scales are stored in bfloat16 where that holds all of them exactly. Reads scales, and leaves
    integers to whoever writes the model.

    Returns:
        how many.
    """
    found = [linear for node in graph.nodes if (linear := match_linear(node)) is not None and _fits(linear)]
    if not found:
        return 0
    raise_opset(graph, OPSET)
    scales = {id(_scale_of(linear)): _scales(linear) for linear in found}
    short = all(np.array_equal(scale.astype(ml_dtypes.bfloat16).astype(np.float32), scale) for scale in scales.values())
    made: dict[tuple[int, int], tuple[gs.Constant, gs.Constant]] = {}
    for linear in found:
        label = f"settle/{output_name_of(linear.nodes[-1])}"
        key = id(linear.weight), id(_scale_of(linear))
        if key not in made:
            scale = scales[key[1]]
            stored = scale.astype(ml_dtypes.bfloat16) if short else scale
            weight = gs.Constant(f"{label}/weight", _Rows(linear))
            made[key] = weight, constant(f"{label}/scale", stored)
        weight, scale_of = made[key]
        bias = linear.b()
        bias = np.zeros(linear.out_features, np.float32) if bias is None else bias.astype(np.float32)
        given = {"x": linear.x, "weight": weight, "weight_scale": scale_of, "bias": constant(f"{label}/bias", bias)}
        y = add_node(graph, INT4_LINEAR, given, f"{label}/y")
        linear.y.inputs[0].outputs.clear()
        y.inputs[0].outputs = [linear.y]
    graph.cleanup(remove_unused_graph_inputs=False)
    graph.nodes = topological(graph)
    return len(found)


def _scale_of(linear: Linear) -> gs.Constant:
    node = linear.quantized
    assert node is not None
    scale = node.inputs[2 if node.op == "MatMulNBits" else 1]
    assert isinstance(scale, gs.Constant)
    return scale


def _fits(linear: Linear) -> bool:
    """Whether its weights are symmetric int4 in blocks of 32, 64, ... inputs, with scales and x in float32."""
    node = linear.quantized
    block = 0 if node is None else int(node.attrs.get("block_size", 0))
    if node is None or not block or block % BLOCK or linear.in_features % block:
        return False
    if _scale_of(linear).dtype != np.float32:
        return False
    if node.op == "MatMulNBits":
        zeros = len(node.inputs) > 3 and node.inputs[3].name
        return node.attrs["bits"] == 4 and not zeros and node.attrs.get("accuracy_level") == INTEGER_ACTIVATIONS
    zeros = len(node.inputs) > 2 and node.inputs[2].name
    along = int(node.attrs.get("axis", 1)) % 2 == (1 if linear.transposed else 0)
    return data_type(linear.weight) == TensorProto.INT4 and not zeros and along and not _is_cast(linear)


def _is_cast(linear: Linear) -> bool:
    """Whether what is dequantized is multiplied in another type."""
    tensor = next(node for node in linear.nodes if node.op in ("MatMul", "Gemm")).inputs[1]
    while tensor.inputs:
        if tensor.inputs[0].op == "Cast":
            return True
        tensor = tensor.inputs[0].inputs[0]
    return False


def _scales(linear: Linear) -> np.ndarray:
    """Of every 32 inputs of each output, [out_features, in_features / 32]."""
    node = linear.quantized
    assert node is not None
    scale = values(_scale_of(linear))
    if node.op == "MatMulNBits":
        scale = scale.reshape(linear.out_features, -1)
    elif not linear.transposed:
        scale = scale.T
    return np.ascontiguousarray(np.repeat(scale, int(node.attrs["block_size"]) // BLOCK, axis=1))


class _Rows(Derived):
    """The integers of a product as the op takes them, [out_features, in_features / 2], two to a byte."""

    def __init__(self, linear: Linear) -> None:
        self._weight, self._by_inputs = linear.weight, not linear.transposed
        self._packed = linear.quantized is not None and linear.quantized.op == "MatMulNBits"
        super().__init__(np.empty(0, np.uint8), [linear.out_features, linear.in_features // 2])

    def load(self) -> np.ndarray:
        q = values(self._weight)
        if self._packed:
            return q.reshape(self.shape)
        q = q.astype(np.int8).view(np.uint8) + np.uint8(8)  # from -8 to 7, with the zero at 8
        q = q.T if self._by_inputs else q
        return np.asarray(q[:, 0::2] | q[:, 1::2] << 4)
