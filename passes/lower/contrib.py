"""Lowers smaller ops of ONNX Runtime's own domain to standard ops: norms, activations, quantized products."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.graph import values
from trimtab.passes.graph.packed import dequantize_blocks
from trimtab.passes.matrices.forms import Quantized
from trimtab.plugins.lowering import Nodes, Operand, type_of

Rule = Callable[[Nodes, gs.Node], list[gs.Tensor | None]]
_F = np.dtype(np.float32)


def _rms(nodes: Nodes, x: gs.Tensor, weight: Operand, epsilon: float) -> gs.Tensor:
    """x / sqrt(mean x² + epsilon) · weight; statistics in float32."""
    dtype = type_of(x)
    wide = nodes.cast(x, _F)
    mean = nodes("ReduceMean", nodes("Mul", wide, wide, dtype=_F), [-1], keepdims=1)
    root = nodes("Sqrt", nodes("Add", mean, np.array(epsilon, _F)))
    return nodes("Mul", nodes.cast(nodes("Div", wide, root, dtype=_F), dtype), weight, dtype=dtype)


def _simplified(nodes: Nodes, node: gs.Node) -> list[gs.Tensor | None]:
    return [_rms(nodes, node.inputs[0], node.inputs[1], float(node.attrs.get("epsilon", 1e-5)))]


def _skip_simplified(nodes: Nodes, node: gs.Node) -> list[gs.Tensor | None]:
    total = _sum(nodes, [*node.inputs[:2], *node.inputs[3:4]])
    return [_rms(nodes, total, node.inputs[2], float(node.attrs.get("epsilon", 1e-5))), None, None, total]


def _skip_norm(nodes: Nodes, node: gs.Node) -> list[gs.Tensor | None]:
    total = _sum(nodes, [*node.inputs[:2], *node.inputs[4:5]])
    norm = [t for t in node.inputs[2:4] if t.name]
    epsilon = float(node.attrs.get("epsilon", 1e-12))
    return [nodes("LayerNormalization", total, *norm, dtype=type_of(total), epsilon=epsilon), None, None, total]


def _sum(nodes: Nodes, tensors: list[gs.Tensor]) -> gs.Tensor:
    first, *rest = [t for t in tensors if t.name]
    for tensor in rest:
        first = nodes("Add", first, tensor, dtype=type_of(first))
    return first


def _gelu(approximate: str) -> Rule:
    def rule(nodes: Nodes, node: gs.Node) -> list[gs.Tensor | None]:
        x = _sum(nodes, node.inputs[:2])
        return [nodes("Gelu", x, dtype=type_of(x), approximate=approximate)]

    return rule


def _quick_gelu(nodes: Nodes, node: gs.Node) -> list[gs.Tensor | None]:
    x = node.inputs[0]
    inner = nodes("Mul", x, np.array(float(node.attrs.get("alpha", 1.702)), type_of(x)), dtype=type_of(x))
    return [nodes("Mul", x, nodes("Sigmoid", inner), dtype=type_of(x))]


def _matmul_nbits(nodes: Nodes, node: gs.Node) -> list[gs.Tensor | None]:
    """A product with blockwise integers if their zero is the middle and the width is 4 or 8 bits, else with floats."""
    x = node.inputs[0]
    dtype = type_of(x)
    n, k, bits, block = (int(node.attrs[key]) for key in ("N", "K", "bits", "block_size"))
    odd = any(t.name for t in node.inputs[3:5])
    if bits in (4, 8) and not odd and k % block == 0:
        packed = values(node.inputs[1]).reshape(n, -1)
        q = packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(n, -1)
        scale = values(node.inputs[2]).reshape(n, k // block)
        centred = (q - np.uint8(1 << (bits - 1))).view(np.int8)  # wraps around, as two's complement does
        y = Quantized(centred.T, scale.T, bits, block).emit(nodes.graph, x, nodes.next("MatMul"), dtype)
    else:
        y = nodes("MatMul", x, np.ascontiguousarray(dequantize_blocks(node).T.astype(dtype)), dtype=dtype)
    return [nodes("Add", y, node.inputs[5]) if len(node.inputs) > 5 and node.inputs[5].name else y]


RULES: dict[str, Rule] = {
    "SimplifiedLayerNormalization": _simplified,
    "SkipSimplifiedLayerNormalization": _skip_simplified,
    "SkipLayerNormalization": _skip_norm,
    "FastGelu": _gelu("tanh"),
    "BiasGelu": _gelu("none"),
    "QuickGelu": _quick_gelu,
    "MatMulNBits": _matmul_nbits,
}
"""Op → the rule that computes its outputs; None for an output that no node may use."""
