"""`Linear`: one view on the many ways a graph can say y = x W + b."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.graph.weights import values


@dataclass(frozen=True)
class Linear:
    """y = x W + b, however the exporter wrote it (MatMul, MatMul + Add, Gemm, transposed weights, ...).

    Attributes:
        nodes: the nodes it consists of, in topological order; removing them removes the Linear.
        x: its input, [..., in_features].
        y: its output, [..., out_features].
        weight: the constant that holds W.
        transposed: True if `weight` lies as [out_features, in_features].
        bias: the constant that holds b, [out_features], or None.
    """

    nodes: tuple[gs.Node, ...]
    x: gs.Tensor
    y: gs.Tensor
    weight: gs.Constant
    transposed: bool
    bias: gs.Constant | None

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1 if self.transposed else 0])

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0 if self.transposed else 1])

    @property
    def params(self) -> int:
        return self.in_features * self.out_features + (self.out_features if self.bias is not None else 0)

    def w(self) -> np.ndarray:
        """W as [in_features, out_features], read from disk if it lies there. Read-only."""
        weight = values(self.weight)
        return weight.T if self.transposed else weight

    def b(self) -> np.ndarray | None:
        """b as [out_features], or None."""
        return None if self.bias is None else values(self.bias).reshape(-1)


def match_linear(node: gs.Node) -> Linear | None:
    """The Linear whose product is `node` (a MatMul or Gemm with a constant 2-D weight), or None.

    Takes in a following Add of a constant of length out_features, where the product has no other use.
    """
    if node.op == "MatMul" and node.domain in (None, ""):
        return _match_matmul(node)
    if node.op == "Gemm" and node.domain in (None, ""):
        return _match_gemm(node)
    return None


def _weight(tensor: gs.Tensor) -> tuple[gs.Constant, bool, tuple[gs.Node, ...]] | None:
    """`tensor` as a 2-D constant, seen through one Transpose of it; with the nodes between."""
    if isinstance(tensor, gs.Constant):
        return (tensor, False, ()) if len(tensor.shape) == 2 else None
    if len(tensor.inputs) == 1 and tensor.inputs[0].op == "Transpose":
        node = tensor.inputs[0]
        source = node.inputs[0]
        if isinstance(source, gs.Constant) and len(source.shape) == 2 and node.attrs.get("perm", [1, 0]) == [1, 0]:
            return source, True, (node,) if len(tensor.outputs) == 1 else ()
    return None


def _match_matmul(node: gs.Node) -> Linear | None:
    found = _weight(node.inputs[1])
    if found is None or isinstance(node.inputs[0], gs.Constant):
        return None
    weight, transposed, before = found
    y = node.outputs[0]
    nodes, bias = (*before, node), None
    out_features = int(weight.shape[0 if transposed else 1])
    if len(y.outputs) == 1 and y.outputs[0].op == "Add":
        add = y.outputs[0]
        other = add.inputs[1] if add.inputs[0] is y else add.inputs[0]
        flat = isinstance(other, gs.Constant) and int(np.prod(other.shape)) == out_features == other.shape[-1]
        if flat and len(other.shape) <= 2:
            nodes, bias, y = (*nodes, add), other, add.outputs[0]
    return Linear(nodes, node.inputs[0], y, weight, transposed, bias)


def _match_gemm(node: gs.Node) -> Linear | None:
    found = _weight(node.inputs[1])
    attrs = node.attrs
    plain = attrs.get("alpha", 1.0) == 1.0 and attrs.get("beta", 1.0) == 1.0 and not attrs.get("transA", 0)
    if found is None or not plain or isinstance(node.inputs[0], gs.Constant):
        return None
    weight, transposed, before = found
    bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    if bias is not None and not isinstance(bias, gs.Constant):
        return None
    return Linear(
        (*before, node), node.inputs[0], node.outputs[0], weight, transposed != bool(attrs.get("transB", 0)), bias
    )
