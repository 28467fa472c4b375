"""What the rows of a packed batch are to its samples: members, their mean, the first of them.

By products with weights of rows: no reduction, which ONNX Runtime 1.31 gets wrong for a batch of 0, and no Gather,
which has no row to read for a sample without tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.graph.edit import constant, insert


def segment_mean(graph: gs.Graph, x: gs.Tensor, offsets: gs.Tensor, name: str) -> gs.Variable:
    """The mean of the rows of `x` [T, width] that each sample has, [batch, width]; 0 of a sample without rows."""
    bounds = _bounds(graph, x, offsets, name)
    one = constant(f"{name}/least", np.array([1], np.int64))
    length = insert(graph, "Sub", [bounds.ends, bounds.starts], f"{name}/lengths_", dtype=np.int64)
    length = insert(graph, "Max", [length, one], f"{name}/lengths", dtype=np.int64)
    belongs = _number(graph, _members(graph, bounds, name), f"{name}/belongs")
    share = insert(graph, "Div", [belongs, _number(graph, length, f"{name}/of")], f"{name}/share", dtype=np.float32)
    return insert(graph, "MatMul", [share, x], f"{name}/mean", dtype=np.float32)


def segment_first(graph: gs.Graph, x: gs.Tensor, offsets: gs.Tensor, name: str) -> gs.Variable:
    """The first row of `x` [T, width] of each sample, [batch, width]; 0 of a sample without rows."""
    bounds = _bounds(graph, x, offsets, name)
    first = insert(graph, "Equal", [bounds.rows, bounds.starts], f"{name}/behind", dtype=np.bool_)
    weights = _number(graph, _before_end(graph, first, bounds, name), f"{name}/belongs")
    return insert(graph, "MatMul", [weights, x], f"{name}/row", dtype=np.float32)


def segment_members(graph: gs.Graph, x: gs.Tensor, offsets: gs.Tensor, name: str) -> gs.Variable:
    """Which rows of `x` [T, width] each sample has, bool [batch, T]."""
    return _members(graph, _bounds(graph, x, offsets, name), name)


class _Bounds(NamedTuple):
    """Where samples start and end, [batch, 1] each, and the numbers of all rows, [T]."""

    starts: gs.Variable
    ends: gs.Variable
    rows: gs.Variable


def _bounds(graph: gs.Graph, x: gs.Tensor, offsets: gs.Tensor, name: str) -> _Bounds:
    def number(key: str, value: object) -> gs.Constant:
        return constant(f"{name}/{key}", np.asarray(value))

    def node(op: str, inputs: list[gs.Tensor], key: str, **attrs: object) -> gs.Variable:
        return insert(graph, op, inputs, f"{name}/{key}", attrs=attrs, dtype=np.int64)

    one = number("one", np.array([1], np.int64))
    wide = node("Cast", [offsets], "wide", to=7)
    ends_of = [number("zero", np.array([0], np.int64)), number("last", np.array([-1], np.int64))]
    far = number("far", np.array([np.iinfo(np.int64).max], np.int64))
    starts = node("Unsqueeze", [node("Slice", [wide, *ends_of], "starts_"), one], "starts")
    ends = node("Unsqueeze", [node("Slice", [wide, one, far], "ends_"), one], "ends")
    count = node("Squeeze", [node("Shape", [x], "rows", start=0, end=1)], "count")
    rows = node("Range", [number("from", np.int64(0)), count, number("step", np.int64(1))], "at")
    return _Bounds(starts, ends, rows)


def _members(graph: gs.Graph, bounds: _Bounds, name: str) -> gs.Variable:
    behind = insert(graph, "GreaterOrEqual", [bounds.rows, bounds.starts], f"{name}/behind", dtype=np.bool_)
    return _before_end(graph, behind, bounds, name)


def _before_end(graph: gs.Graph, which: gs.Tensor, bounds: _Bounds, name: str) -> gs.Variable:
    before = insert(graph, "Less", [bounds.rows, bounds.ends], f"{name}/before", dtype=np.bool_)
    return insert(graph, "And", [which, before], f"{name}/inside", dtype=np.bool_)


def _number(graph: gs.Graph, x: gs.Tensor, name: str) -> gs.Variable:
    return insert(graph, "Cast", [x], name, attrs={"to": 1}, dtype=np.float32)
