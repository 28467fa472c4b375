"""Replaces tensors that are gathered through a grid of all their own indices by the tensors themselves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.canonicalize.fold import is_small
from trimtab.passes.canonicalize.simplify import guarded
from trimtab.passes.graph import constant, insert, replace_uses, values
from trimtab.passes.graph.shapes import Dim, dim, entries

_UNSQUEEZE_TAKES_AXES = 13  # as an input; before, they were an attribute
_BROADCAST = {"Add", "Max", "Min", "Mul", "Sum"}


def unfold_grids(graph: gs.Graph) -> int:
    """GatherND(x, grid of all indices of x) becomes x with axes of size one.

    Exporters write this for a mask that the model indexes elementwise under `vmap` (transformers 5). It takes
    a dozen small nodes, and an index pair for each element of the result, to compute mask[:, None, None, :].
    """
    if graph.opset < _UNSQUEEZE_TAKES_AXES:
        return 0
    kept = guarded(graph)
    changed = 0
    for node in list(graph.nodes):
        if node.op != "GatherND" or node.domain or node.attrs.get("batch_dims", 0) or id(node.outputs[0]) in kept:
            continue
        axes = _new_axes(node.inputs[0], node.inputs[1])
        if axes is None:
            continue
        old, name = node.outputs[0], f"canonicalize/{node.outputs[0].name}"
        new = node.inputs[0]
        if axes:
            new = insert(graph, "Unsqueeze", [new, constant(f"{name}.axes", np.array(axes))], name, dtype=new.dtype)
            new.shape = old.shape
        replace_uses(graph, old, new)
        changed += 1
    return changed


@dataclass(frozen=True)
class _Walk:
    """Range(0, size, 1) along one axis of a tensor whose other axes are of size one."""

    rank: int
    axis: int
    size: Dim


def _new_axes(x: gs.Tensor, indices: gs.Tensor) -> list[int] | None:
    """The axes that x needs to equal GatherND(x, indices); None unless the indices walk along each axis of x."""
    concat = _producer(indices, "Concat")
    lasts = [_producer(column, "Unsqueeze") for column in concat.inputs] if concat is not None else []
    if concat is None or x.shape is None or len(lasts) != len(x.shape):
        return None
    columns = [last.inputs[0] for last in lasts if last is not None]  # [...] each, before they are put side by side
    walked = _before_broadcast(columns)
    walks = [walk for walk in map(_walk, walked or ()) if walk is not None]
    if len(walks) != len(lasts) or len({walk.rank for walk in walks}) != 1:
        return None
    rank, places = walks[0].rank, [walk.axis for walk in walks]
    at_the_end = all(_axes(last) in ([-1], [rank]) for last in lasts) and concat.attrs["axis"] in (-1, rank)
    in_order = places == sorted(set(places))
    all_of_x = all(walk.size == dim(x, axis) for axis, walk in enumerate(walks))
    return [axis for axis in range(rank) if axis not in places] if at_the_end and in_order and all_of_x else None


def _before_broadcast(columns: list[gs.Tensor]) -> list[gs.Tensor] | None:
    """The columns before Expand; None unless Expand gives them exactly the shape of their joint broadcast."""
    expands = [_producer(column, "Expand") for column in columns]
    walked = [expand.inputs[0] for expand in expands if expand is not None]
    for expand in expands:
        shape = _producer(expand.inputs[1], "Shape") if expand is not None else None
        if shape is None or shape.attrs.get("start") or "end" in shape.attrs or not shape.inputs[0].inputs:
            return None
        joined = shape.inputs[0].inputs[0]
        if joined.domain or joined.op not in _BROADCAST or {id(t) for t in joined.inputs} != {id(t) for t in walked}:
            return None
    return walked


def _walk(tensor: gs.Tensor) -> _Walk | None:
    counts = _producer(tensor, "Range")
    if counts is not None:
        start, limit, step = counts.inputs
        size = entries(limit)
        plain = [_integers(start), _integers(step)] == [[0], [1]]
        return _Walk(1, 0, size[0]) if plain and size is not None and len(size) == 1 else None
    unsqueeze = _producer(tensor, "Unsqueeze")
    inner = _walk(unsqueeze.inputs[0]) if unsqueeze is not None else None
    axes = _axes(unsqueeze)
    if inner is None or axes is None:
        return None
    rank = inner.rank + len(axes)
    new = {axis % rank for axis in axes}
    return _Walk(rank, [axis for axis in range(rank) if axis not in new][inner.axis], inner.size)


def _producer(tensor: gs.Tensor, op: str) -> gs.Node | None:
    node = tensor.inputs[0] if not isinstance(tensor, gs.Constant) and len(tensor.inputs) == 1 else None
    return node if node is not None and node.op == op and not node.domain else None


def _axes(unsqueeze: gs.Node | None) -> list[int] | None:
    """The axes that `unsqueeze` adds; None if they are not constant."""
    return None if unsqueeze is None else _integers(unsqueeze.inputs[1])


def _integers(tensor: gs.Tensor) -> list[int] | None:
    return [int(v) for v in values(tensor).reshape(-1)] if is_small(tensor) else None
