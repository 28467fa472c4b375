"""`Linear`: one view of the many forms of y = x W + b in a graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.graph.packed import dequantize_blocks, dequantize_int4, dequantize_linear
from trimtab.passes.graph.weights import stored_bytes, values
from trimtab.plugins import DOMAIN, INT4_LINEAR


@dataclass(frozen=True)
class Linear:
    """y = x W + b in any exporter's form (MatMul, MatMul + Add, Gemm, transposed or quantized weights, ...).

    Attributes:
        nodes: its nodes, in topological order; removing them removes the Linear. Nodes between weight and product
            (Transpose, Cast, DequantizeLinear) are included unless other nodes use them too.
        x: its input, [..., in_features].
        y: its output, [..., out_features].
        weight: the constant with W, or with its integers if `quantized` is set.
        transposed: True if `weight` is stored as [out_features, in_features].
        bias: the constant with b, [out_features], or None.
        quantized: the node that dequantizes W: a DequantizeLinear, com.microsoft MatMulNBits or the dialect's
            Int4Linear; or None.
    """

    nodes: tuple[gs.Node, ...]
    x: gs.Tensor
    y: gs.Tensor
    weight: gs.Constant
    transposed: bool
    bias: gs.Constant | None
    quantized: gs.Node | None = None

    @property
    def in_features(self) -> int:
        if self.quantized is not None and self.quantized.op == "MatMulNBits":
            return int(self.quantized.attrs["K"])
        if self.quantized is not None and self.quantized.op == INT4_LINEAR.name:
            return 2 * int(self.weight.shape[1])  # two values per byte
        return int(self.weight.shape[1 if self.transposed else 0])

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0 if self.transposed else 1])

    @property
    def params(self) -> int:
        return self.in_features * self.out_features + (self.out_features if self.bias is not None else 0)

    @property
    def bytes(self) -> int:
        """Bytes of its constants as stored: weight, bias, scales and zero points."""
        return distinct_bytes([self])

    @property
    def constants(self) -> tuple[gs.Constant, ...]:
        """Its constants: weight, bias, scales and zero points."""
        parts = [self.weight, self.bias, *(self.quantized.inputs[1:] if self.quantized is not None else ())]
        return tuple(part for part in parts if isinstance(part, gs.Constant))

    def w(self) -> np.ndarray:
        """W as [in_features, out_features], read from disk if it is stored there. Read-only."""
        if self.quantized is None:
            weight = values(self.weight)
        elif self.quantized.op == "MatMulNBits":
            weight = dequantize_blocks(self.quantized)
        elif self.quantized.op == INT4_LINEAR.name:
            weight = dequantize_int4(self.quantized)
        else:
            weight = dequantize_linear(self.quantized)
        return weight.T if self.transposed else weight

    def b(self) -> np.ndarray | None:
        """b as [out_features], or None."""
        return None if self.bias is None else values(self.bias).reshape(-1)


def distinct_bytes(linears: Iterable[Linear]) -> int:
    """Bytes of the constants of `linears` as stored; a shared constant counts once."""
    return sum(stored_bytes(t) for t in {id(t): t for linear in linears for t in linear.constants}.values())


def distinct_params(linears: Iterable[Linear]) -> int:
    """Parameters of `linears`; a shared weight or bias counts once."""
    counts: dict[int, int] = {}
    for linear in linears:
        counts[id(linear.weight)] = linear.in_features * linear.out_features
        if linear.bias is not None:
            counts[id(linear.bias)] = linear.out_features
    return sum(counts.values())


def match_linear(node: gs.Node) -> Linear | None:
    """The Linear whose product is `node` (MatMul, Gemm, MatMulNBits or Int4Linear with a constant weight), or None.

    A following Add of a constant of length out_features is its bias, if the product has no other use.
    """
    matcher = _MATCHERS.get((node.domain or "", node.op))
    return matcher(node) if matcher and not isinstance(node.inputs[0], gs.Constant) else None


@dataclass(frozen=True)
class _Weight:
    constant: gs.Constant
    transposed: bool
    nodes: tuple[gs.Node, ...]
    quantized: gs.Node | None


def _weight(tensor: gs.Tensor) -> _Weight | None:
    """The 2-D constant from which Transpose, Cast and DequantizeLinear compute `tensor`, with the unshared nodes."""
    nodes: list[gs.Node] = []
    transposed, quantized, shared = False, None, False
    while not isinstance(tensor, gs.Constant):
        if len(tensor.inputs) != 1:
            return None
        node = tensor.inputs[0]
        if node.op == "Transpose" and node.attrs.get("perm", [1, 0]) == [1, 0]:
            transposed = not transposed
        elif node.op == "DequantizeLinear" and quantized is None:
            if not all(isinstance(t, gs.Constant) for t in node.inputs):
                return None
            quantized = node
        elif node.op != "Cast":
            return None
        shared = shared or len(tensor.outputs) > 1
        if not shared:
            nodes.insert(0, node)
        tensor = node.inputs[0]
    return _Weight(tensor, transposed, tuple(nodes), quantized) if len(tensor.shape) == 2 else None


def _with_bias(node: gs.Node, size: int) -> tuple[tuple[gs.Node, ...], gs.Tensor, gs.Constant | None]:
    """`node` with the Add of a constant of `size` values that follows it: nodes, output, bias."""
    y = node.outputs[0]
    if len(y.outputs) == 1 and y.outputs[0].op == "Add":
        add = y.outputs[0]
        other = add.inputs[1] if add.inputs[0] is y else add.inputs[0]
        if isinstance(other, gs.Constant) and other.shape and int(np.prod(other.shape)) == size == other.shape[-1]:
            return (node, add), add.outputs[0], other
    return (node,), y, None


def _match_matmul(node: gs.Node) -> Linear | None:
    weight = _weight(node.inputs[1])
    if weight is None:
        return None
    nodes, y, bias = _with_bias(node, int(weight.constant.shape[0 if weight.transposed else 1]))
    return Linear(
        (*weight.nodes, *nodes), node.inputs[0], y, weight.constant, weight.transposed, bias, weight.quantized
    )


def _match_gemm(node: gs.Node) -> Linear | None:
    weight = _weight(node.inputs[1])
    attrs = node.attrs
    if weight is None or attrs.get("alpha", 1.0) != 1.0 or attrs.get("transA", 0):
        return None
    transposed = weight.transposed != bool(attrs.get("transB", 0))
    size = int(weight.constant.shape[0 if transposed else 1])
    bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    nodes: tuple[gs.Node, ...] = (node,)
    y = node.outputs[0]
    if bias is None:
        nodes, y, bias = _with_bias(node, size)
    elif attrs.get("beta", 1.0) != 1.0 or not isinstance(bias, gs.Constant) or int(np.prod(bias.shape)) != size:
        return None
    return Linear((*weight.nodes, *nodes), node.inputs[0], y, weight.constant, transposed, bias, weight.quantized)


def _match_blocks(node: gs.Node) -> Linear | None:
    """com.microsoft MatMulNBits: weight [N, blocks, bytes per block], scales, zero points, group index, bias."""
    optional = [t if t.name else None for t in (*node.inputs[3:6], *[gs.Variable.empty()] * 3)][:3]
    zeros, group, bias = optional
    constants = [node.inputs[1], node.inputs[2], *(t for t in (zeros, bias) if t is not None)]
    if group is not None or not all(isinstance(t, gs.Constant) for t in constants):
        return None
    nodes: tuple[gs.Node, ...] = (node,)
    y = node.outputs[0]
    if bias is None:
        nodes, y, bias = _with_bias(node, int(node.attrs["N"]))
    return Linear(nodes, node.inputs[0], y, node.inputs[1], True, bias, node)


def _match_int4(node: gs.Node) -> Linear | None:
    """The dialect's Int4Linear: x, weight [N, K / 2], scales [N, K / 32], bias."""
    if not all(isinstance(tensor, gs.Constant) for tensor in node.inputs[1:]):
        return None
    return Linear((node,), node.inputs[0], node.outputs[0], node.inputs[1], True, node.inputs[3], node)


_MATCHERS = {
    ("", "MatMul"): _match_matmul,
    ("", "Gemm"): _match_gemm,
    ("com.microsoft", "MatMulNBits"): _match_blocks,
    (DOMAIN, INT4_LINEAR.name): _match_int4,
}
