"""Replaces products with blockwise int4 weights by the dialect's Int4Linear, whose native kernel is faster."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from trimtab.passes.graph import constant, output_name_of, topological, values
from trimtab.passes.graph.weights import Derived, data_type
from trimtab.passes.matrices.forms import INTEGER_ACTIVATIONS
from trimtab.plugins import DOMAIN, INT4_LINEAR, add_node
from trimtab.plugins.dialect import OPSET
from trimtab.plugins.int4_linear import BLOCK


@dataclass(frozen=True)
class _Product:
    """A product that may become Int4Linear.

    Attributes:
        node: MatMul behind a DequantizeLinear, or MatMulNBits.
        weight, scale: the stored integers and their scales.
        in_features, out_features, block: the sizes; `block` inputs share a scale.
        packed: rows with two integers per byte, as in MatMulNBits.
    """

    node: gs.Node
    weight: gs.Constant
    scale: gs.Constant
    in_features: int
    out_features: int
    block: int
    packed: bool

    @property
    def key(self) -> tuple[int, ...]:
        """A key that is equal for products whose Int4Linear has the same constants."""
        return id(self.weight), id(self.scale), self.out_features, self.block, self.packed

    @property
    def scales(self) -> np.ndarray:
        """The scales of blocks of 32 inputs, [out_features, in_features / 32]."""
        scale = values(self.scale)
        scale = scale.reshape(self.out_features, -1) if self.packed else scale.T
        return np.ascontiguousarray(np.repeat(scale, self.block // BLOCK, axis=1))


def use_int4_linear(graph: gs.Graph) -> int:
    """Replace products with int4 weights that ONNX Runtime computes in integers by Int4Linear, in place.

    These are MatMulNBits with accuracy_level 4, and MatMul behind a DequantizeLinear without other readers. Integers
    and scales keep their values. As in ONNX Runtime, x is rounded to bytes in blocks, here always of 32, even if
    those of the weights are larger. Scales are stored in bfloat16 if that represents all of them exactly. Only scales
    are read here; integers are read when the model is written.

    Returns:
        the number of replaced products.
    """
    outputs = {id(tensor) for tensor in graph.outputs}
    products = [product for node in graph.nodes if (product := _match(node, outputs)) is not None]
    if not products or graph.opset < OPSET:
        return 0
    scales = {product.key: product.scales for product in products}
    short = all(np.array_equal(scale.astype(ml_dtypes.bfloat16).astype(np.float32), scale) for scale in scales.values())
    present = [node.inputs[2] for node in graph.nodes if (node.domain, node.op) == (DOMAIN, INT4_LINEAR.name)]
    if present:  # a model has only one form of an op
        was_short = present[0].dtype != np.float32
        if was_short and not short:
            return 0
        short = was_short
    constants: dict[tuple[int, ...], tuple[gs.Constant, gs.Constant]] = {}
    own = {id(node) for node in graph.nodes}
    for product in products:
        label, key = f"settle/{output_name_of(product.node)}", product.key
        if key not in constants:
            stored = scales[key].astype(ml_dtypes.bfloat16) if short else scales[key]
            constants[key] = gs.Constant(f"{label}/weight", _Rows(product)), constant(f"{label}/scale", stored)
        y, bias = _with_bias(product, own, outputs)
        arguments = {"x": product.node.inputs[0], "weight": constants[key][0], "weight_scale": constants[key][1]}
        new = add_node(graph, INT4_LINEAR, arguments | {"bias": constant(f"{label}/bias", bias)}, f"{label}/y")
        y.inputs[0].outputs.clear()
        new.inputs[0].outputs = [y]
    graph.cleanup(remove_unused_graph_inputs=False)
    graph.nodes = topological(graph)
    return len(products)


def _match(node: gs.Node, outputs: set[int]) -> _Product | None:
    if (node.domain, node.op) == ("com.microsoft", "MatMulNBits"):
        product = _match_blocks(node)
    elif node.op == "MatMul" and not node.domain:
        product = _match_dequantized(node, outputs)
    else:
        return None
    if product is None or product.scale.dtype != np.float32 or not product.in_features or not product.out_features:
        return None
    return product if product.block and not product.block % BLOCK and not product.in_features % product.block else None


def _match_blocks(node: gs.Node) -> _Product | None:
    _, weight, scale, *optional = node.inputs
    whole = isinstance(weight, gs.Constant) and isinstance(scale, gs.Constant)
    if not whole or any(tensor.name for tensor in optional):  # zero points, an order of groups, a bias
        return None
    attrs = node.attrs
    if attrs.get("bits", 4) != 4 or attrs.get("accuracy_level", 0) != INTEGER_ACTIVATIONS:
        return None
    return _Product(node, weight, scale, int(attrs["K"]), int(attrs["N"]), int(attrs["block_size"]), True)


def _match_dequantized(node: gs.Node, outputs: set[int]) -> _Product | None:
    x, w = node.inputs
    source = w.inputs[0] if len(w.inputs) == 1 else None
    if source is None or source.op != "DequantizeLinear" or len(w.outputs) > 1 or id(w) in outputs:
        return None
    weight, scale, *zeros = source.inputs
    if any(tensor.name for tensor in zeros) or "output_dtype" in source.attrs or isinstance(x, gs.Constant):
        return None
    if not isinstance(weight, gs.Constant) or not isinstance(scale, gs.Constant) or source.attrs.get("axis", 1) != 0:
        return None
    if data_type(weight) != TensorProto.INT4 or len(weight.shape) != 2 or len(scale.shape) != 2:
        return None
    if len(weight.outputs) > 1 or len(scale.outputs) > 1:
        return None  # ONNX Runtime 1.31 fuses none of these
    size = int(source.attrs.get("block_size", 0))
    return _Product(node, weight, scale, int(weight.shape[0]), int(weight.shape[1]), size, False)


def _with_bias(product: _Product, own: set[int], outputs: set[int]) -> tuple[gs.Tensor, np.ndarray]:
    """The output of the new node, and its bias: the constant of an Add behind the product, or zeros."""
    y, size = product.node.outputs[0], product.out_features
    after = y.outputs[0] if len(y.outputs) == 1 and id(y) not in outputs else None
    if after is not None and after.op == "Add" and not after.domain and id(after) in own:
        other = after.inputs[1] if after.inputs[0] is y else after.inputs[0]
        if isinstance(other, gs.Constant) and tuple(other.shape) == (size,) and other.dtype == np.float32:
            return after.outputs[0], values(other)
    return y, np.zeros(size, np.float32)


class _Rows(Derived):
    """The integers of a product in the op's form, [out_features, in_features / 2], two per byte."""

    def __init__(self, product: _Product) -> None:
        self._weight, self._packed = product.weight, product.packed
        super().__init__(np.empty(0, np.uint8), [product.out_features, product.in_features // 2])

    def load(self) -> np.ndarray:
        q = values(self._weight)
        if self._packed:
            return q.reshape(self.shape)
        q = (q.astype(np.int8).view(np.uint8) + np.uint8(8)).T  # from -8 to 7, with the zero at 8
        return np.asarray(q[:, 0::2] | q[:, 1::2] << 4)
