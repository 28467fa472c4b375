"""Recognises nodes that compute each token by itself, so that they work on packed tokens, perhaps with another axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.graph import constant, values
from trimtab.passes.graph.linear import match_linear

__all__ = ["Change", "pack_node"]

Change = Callable[[], None]
"""A change of a node, or of its constants, that is needed when its inputs lose an axis."""

_ELEMENTWISE = frozenset([
    "Abs", "Add", "BiasGelu", "Cast", "Ceil", "Celu", "Clip", "Div", "Dropout", "Elu", "Erf", "Exp", "FastGelu",
    "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg",
    "Pow", "QuickGelu", "Reciprocal", "Relu", "Selu", "Sigmoid", "Sign", "Softplus", "Softsign", "Sqrt", "Sub", "Swish",
    "Tanh", "ThresholdedRelu", "Where",
])  # fmt: skip
_PRODUCTS = frozenset(["MatMul", "MatMulNBits"])
_NORMS = frozenset(["LayerNormalization", "LpNormalization", "RMSNormalization", "SimplifiedLayerNormalization"])
_SKIP_NORMS = frozenset(["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
_LAST_AXIS = frozenset(["LogSoftmax", "Softmax", "Split"])
_QUANTIZERS = frozenset(["DequantizeLinear", "QuantizeLinear"])
_REDUCTIONS = frozenset(["ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare"])
_SPARSE = frozenset(["GatherBlocks", "SelectBlocks", "SparseDown", "SparseUp"])


def pack_node(node: gs.Node, packed: Mapping[int, int]) -> tuple[str | None, list[Change]]:
    """Why `node` does not compute each token by itself; or None, and the changes that packed tokens need.

    Args:
        packed: id of each tensor that will be packed → its number of axes before, [batch, tokens, ...].
    """
    axes = max(packed[id(t)] for t in node.inputs if id(t) in packed)
    firsts = id(node.inputs[0]) in packed and not any(id(t) in packed for t in node.inputs[1:])
    if node.op in _ELEMENTWISE:
        return _elementwise(node, packed, axes)
    if node.op in _SKIP_NORMS:
        return _others_fixed(node, packed), []
    if node.op == "Concat":
        whole = all(packed.get(id(t)) == axes for t in node.inputs)
        return _last_axis(node, packed, axes) if whole else ("one of its operands does not depend on tokens", [])
    if not firsts and node.op not in _SPARSE:
        return "an operand other than the first depends on tokens", []
    if node.op in _PRODUCTS:
        matrix = match_linear(node) is not None or len(node.inputs[1].shape or ()) == 2
        return (_others_fixed(node, packed) if matrix else "its second operand is not a matrix"), []
    if node.op in _QUANTIZERS:
        return _quantizer(node, axes)
    if node.op in _NORMS or node.op in _LAST_AXIS:
        return _last_axis(node, packed, axes)
    if node.op in _REDUCTIONS:
        return _reduction(node, axes)
    if node.op == "Slice":
        return _slice(node, packed, axes)
    if node.op in _SPARSE:
        return ("its choice is shared by all tokens" if node.attrs.get("shared") else _others_fixed(node, packed)), []
    return "it does not compute each token by itself", []


def _fixed(tensor: gs.Tensor) -> bool:
    """Whether `tensor` depends only on constants."""
    stack = [tensor]
    while stack:
        current = stack.pop()
        if isinstance(current, gs.Constant) or current.is_empty():
            continue
        if not current.inputs:
            return False
        stack += [t for node in current.inputs for t in node.inputs]
    return True


def _others_fixed(node: gs.Node, packed: Mapping[int, int]) -> str | None:
    odd = [t for t in node.inputs if id(t) not in packed and not _fixed(t)]
    return f"its operand {odd[0].name} is not a constant" if odd else None


def _elementwise(node: gs.Node, packed: Mapping[int, int], axes: int) -> tuple[str | None, list[Change]]:
    changes: list[Change] = []
    for number, tensor in enumerate(node.inputs):
        if tensor.is_empty():
            continue
        if id(tensor) in packed:
            if packed[id(tensor)] != axes:
                return "its operands have different numbers of axes", []
            continue
        if not _fixed(tensor) or tensor.shape is None:
            return f"its operand {tensor.name} is not a constant", []
        shape = list(tensor.shape)
        by_token = shape[: max(0, len(shape) - (axes - 2))]
        if any(size != 1 for size in by_token):
            return f"its operand {tensor.name} differs from token to token", []
        if len(by_token) > 1:  # it would add an axis to packed tokens
            if not isinstance(tensor, gs.Constant):
                return f"its operand {tensor.name} is computed", []
            changes.append(partial(_reshape, node, number, shape[len(by_token) - 1 :]))
    return None, changes


def _reshape(node: gs.Node, number: int, shape: list[int]) -> None:
    old = node.inputs[number]
    node.inputs[number] = constant(f"unpad/{node.outputs[0].name}/{number}", values(old).reshape(shape))


def _last_axis(node: gs.Node, packed: Mapping[int, int], axes: int) -> tuple[str | None, list[Change]]:
    default = 0 if node.op in ("Concat", "Split") else -1
    if int(node.attrs.get("axis", default)) not in (-1, axes - 1):
        return "its axis is not the last one", []
    return _others_fixed(node, packed), [lambda: node.attrs.update(axis=-1)]


def _quantizer(node: gs.Node, axes: int) -> tuple[str | None, list[Change]]:
    """Accept one scale for the tensor, or one per feature; refuse scales computed from tokens, or per token."""
    if not all(_fixed(tensor) for tensor in node.inputs[1:]):
        return "its scales are computed from tokens", []
    shape = node.inputs[1].shape
    if shape is not None and int(np.prod(shape)) == 1:
        return None, []
    if shape is None or len(shape) != 1 or int(node.attrs.get("axis", 1)) not in (-1, axes - 1):
        return "its scales differ from token to token", []
    return None, [lambda: node.attrs.update(axis=-1)]


def _reduction(node: gs.Node, axes: int) -> tuple[str | None, list[Change]]:
    axes_input = node.inputs[1] if len(node.inputs) > 1 else None
    if axes_input is None and "axes" not in node.attrs:
        return "it reduces all axes", []
    if axes_input is not None and not isinstance(axes_input, gs.Constant):
        return "its axes are computed", []
    over = [int(a) for a in (node.attrs["axes"] if axes_input is None else values(axes_input).reshape(-1))]
    if any(a not in (-1, axes - 1) for a in over) or not over or not int(node.attrs.get("keepdims", 1)):
        return "it reduces other axes than the last", []

    def change() -> None:
        if "axes" in node.attrs:  # raising the opset may have turned the attribute into an input
            node.attrs["axes"] = [-1]
        else:
            node.inputs[1] = constant(f"unpad/{node.outputs[0].name}/axes", np.array([-1], np.int64))

    return None, [change]


def _slice(node: gs.Node, packed: Mapping[int, int], axes: int) -> tuple[str | None, list[Change]]:
    over = node.inputs[3] if len(node.inputs) > 3 else None
    if not isinstance(over, gs.Constant) or any(int(a) not in (-1, axes - 1) for a in values(over).reshape(-1)):
        return "it slices other axes than the last", []

    def change() -> None:
        node.inputs[3] = constant(f"unpad/{node.outputs[0].name}/axes", np.full(over.shape, -1, np.int64))

    return _others_fixed(node, packed), [change]
