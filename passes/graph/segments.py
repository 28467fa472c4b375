"""Nodes that compute, for each sample of a packed batch, the mean of its rows, its first row, or which rows it has."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.graph.edit import constant, insert
from trimtab.plugins import POOL_TOKENS, add_node


def segment_mean(graph: gs.Graph, x: gs.Tensor, offsets: gs.Tensor, name: str) -> gs.Variable:
    """The mean of each sample's rows of `x` [T, width], [batch, width]; 0 for a sample without rows."""
    return add_node(graph, POOL_TOKENS, {"x": x, "offsets": offsets}, name)


def segment_first(graph: gs.Graph, x: gs.Tensor, offsets: gs.Tensor, name: str) -> gs.Variable:
    """Each sample's first row of `x` [T, width], [batch, width]; 0 for a sample without rows."""
    return add_node(graph, POOL_TOKENS, {"x": x, "offsets": offsets}, name, most=1)


def segment_members(graph: gs.Graph, offsets: gs.Tensor, name: str, x: gs.Tensor | None = None) -> gs.Variable:
    """Whether each row belongs to each sample, bool [batch, T].

    Args:
        x: [T, width], whose shape gives T. Without it, T is the last offset, so that the result depends on the offsets
            alone.
    """

    def number(key: str, value: object) -> gs.Constant:
        return constant(f"{name}/{key}", np.asarray(value))

    def node(op: str, inputs: list[gs.Tensor], key: str, dtype: object = np.int64, **attrs: object) -> gs.Variable:
        return insert(graph, op, inputs, f"{name}/{key}", attrs=attrs, dtype=dtype)

    one = number("one", np.array([1], np.int64))
    wide = node("Cast", [offsets], "wide", to=7)
    ends_of = [number("zero", np.array([0], np.int64)), number("last", np.array([-1], np.int64))]
    far = number("far", np.array([np.iinfo(np.int64).max], np.int64))
    starts = node("Unsqueeze", [node("Slice", [wide, *ends_of], "starts_"), one], "starts")
    ends = node("Unsqueeze", [node("Slice", [wide, one, far], "ends_"), one], "ends")
    size = node("Slice", [wide, ends_of[1], far], "last_") if x is None else node("Shape", [x], "rows", start=0, end=1)
    count = node("Squeeze", [size], "count")
    rows = node("Range", [number("from", np.int64(0)), count, number("step", np.int64(1))], "at")
    behind = node("GreaterOrEqual", [rows, starts], "behind", np.bool_)
    return node("And", [behind, node("Less", [rows, ends], "before", np.bool_)], "inside", np.bool_)
