"""Additive masks: large negative numbers before a softmax that mean minus infinity, but stay finite in half precision.

    mask -> Where (0, -3.4e38) -> Add (scores) -> Softmax

With minus infinity, a fully masked row, such as left padding in a causal decoder, would become NaN. NaN in the states
of padding would reach every token, since 0 times NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Collection

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.graph import constant, insert, values
from trimtab.passes.precision.tensors import MOVES, has_subgraphs, is_float

MASK = 1e30
"""Numbers from this size on are not weights, but mean minus infinity."""

_FAR = 1e4  # the smallest number that exporters use for masking
_COARSE = 1 / 16  # rounding error of a score: its probability changes by 6 %

_READ = {
    ("", "Softmax"): 0, ("", "LogSoftmax"): 0, ("", "Attention"): 3, ("com.microsoft", "Attention"): 5,
    ("com.microsoft", "MultiHeadAttention"): 5, ("com.microsoft", "GroupQueryAttention"): 10,
}  # fmt: skip
"""Domain and op -> the input that contains scores, or is added to them."""
_ARITHMETIC = frozenset(["Add", "Clip", "Concat", "Div", "Max", "Min", "Mul", "Neg", "Sub", "Where"])


def bound(dtype: np.dtype) -> float:
    """The number whose negative replaces minus infinity: two of them and a score have a finite sum in `dtype`."""
    return min(float(ml_dtypes.finfo(dtype).max) / 3, MASK)


def mask_tensors(nodes: Collection[gs.Node]) -> set[int]:
    """Ids of tensors from which a softmax's input is computed only by arithmetic, selections and changes of shape."""
    reached: set[int] = set()
    pending: list[gs.Tensor] = []
    for node in nodes:
        place = _READ.get(((node.domain or "").removeprefix("ai.onnx"), node.op))
        if place is not None and place < len(node.inputs):
            pending.append(node.inputs[place])
    while pending:
        tensor = pending.pop()
        if not tensor.name or id(tensor) in reached:
            continue
        reached.add(id(tensor))
        for node in tensor.inputs:
            if node.op in MOVES:
                pending.append(node.inputs[0])
            elif node.op in _ARITHMETIC:
                pending += node.inputs[1:] if node.op == "Where" else node.inputs
    return reached


def biased_softmaxes(nodes: Collection[gs.Node], masks: set[int], counted: set[int], dtype: np.dtype) -> set[int]:
    """Ids of the softmaxes whose scores include positions, as with ALiBi, and of the nodes from the bias to them.

    The bias grows with the position, or is a table of such values. From some hundreds on, `dtype` rounds neighbouring
    positions to the same number, in the bias or in its sum with a score.

    Args:
        masks: `mask_tensors(nodes)`.
        counted: `counted_nodes` of the graph.
    """
    biased: set[int] = set()
    reached: set[int] = set()
    for node in nodes:
        place = _READ.get(((node.domain or "").removeprefix("ai.onnx"), node.op))
        read = node.inputs[place : place + 1] if place is not None else node.inputs
        between = place is None and any(id(t) in masks for t in node.outputs)
        if (place is None and not between) or id(node) in counted:
            continue
        adds = node.op in ("Add", "Sub") or place is not None
        if any(id(t) in reached or (id(t) in masks and _is_bias(t, adds, counted, dtype)) for t in read):
            biased.add(id(node))
            reached |= {id(t) for t in node.outputs if between}
    return biased


def _is_bias(tensor: gs.Tensor, adds: bool, counted: set[int], dtype: np.dtype) -> bool:
    """Whether `tensor` is computed from positions, or is a table that `dtype` rounds too coarsely."""
    if isinstance(tensor, gs.Constant):
        if not is_float(tensor) or int(np.prod(tensor.shape)) <= 2:
            return False
        array = values(tensor)
        largest = float(np.abs(array).max())
        coarse = largest < _FAR and float(np.abs(array - array.astype(dtype).astype(np.float32)).max()) > _COARSE
        return coarse and len(np.unique(array)) > 2
    return adds and bool(tensor.inputs) and id(tensor.inputs[0]) in counted and not reaches_far(tensor, _FAR)


def reaches_far(tensor: gs.Tensor, limit: float) -> bool:
    """Whether `tensor`, one of `mask_tensors`, may contain numbers of `limit` or more.

    It may if it is computed from such a constant, or from an unknown tensor: an input, a branch or a loop.
    """
    seen: set[int] = set()
    pending = [tensor]
    while pending:
        tensor = pending.pop()
        if id(tensor) in seen or not is_float(tensor):
            continue
        seen.add(id(tensor))
        if isinstance(tensor, gs.Constant):
            array = values(tensor)
            if bool(np.any(np.isfinite(array) & (np.abs(array) >= limit))):
                return True
        elif not tensor.inputs or has_subgraphs(tensor.inputs[0]):
            return True
        elif tensor.inputs[0].op in _ARITHMETIC | MOVES:
            pending += tensor.inputs[0].inputs
    return False


def saturated(graph: gs.Graph, tensor: gs.Tensor, dtype: np.dtype) -> gs.Tensor:
    """`tensor`, float32, with finite numbers clipped to ± `bound(dtype)`. Infinities of the model stay."""
    name, limit = f"precision/{tensor.name}", bound(dtype)
    ends = [constant(f"{name}/{end}", np.array(sign * limit, np.float32)) for end, sign in (("low", -1), ("high", 1))]
    clipped = insert(graph, "Clip", [tensor, *ends], f"{name}/clipped", dtype=np.dtype(np.float32))
    infinite = insert(graph, "IsInf", [tensor], f"{name}/infinite", dtype=np.dtype(bool))
    finite = insert(graph, "Where", [infinite, tensor, clipped], f"{name}/finite", dtype=np.dtype(np.float32))
    for each in (clipped, infinite, finite):
        each.shape = tensor.shape
    return finite
