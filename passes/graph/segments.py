"""The mean, and the first, of the tokens of each sample of a packed batch.

By products with weights of rows: no reduction, which ONNX Runtime 1.31 gets wrong for a batch of 0, and no Gather,
which has no row to read for a sample without tokens.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.graph.edit import constant, insert


def segment_mean(graph: gs.Graph, x: gs.Tensor, offsets: gs.Tensor, name: str) -> gs.Variable:
    """The mean of the rows of `x` [T, width] that each sample has, [batch, width]; 0 of a sample without rows."""
    return _weighed(graph, x, offsets, name, first=False)


def segment_first(graph: gs.Graph, x: gs.Tensor, offsets: gs.Tensor, name: str) -> gs.Variable:
    """The first row of `x` [T, width] of each sample, [batch, width]; 0 of a sample without rows."""
    return _weighed(graph, x, offsets, name, first=True)


def _weighed(graph: gs.Graph, x: gs.Tensor, offsets: gs.Tensor, name: str, first: bool) -> gs.Variable:
    """A product of `x` with the weights of its rows in each sample: 1 of the `first` one, or 1 / n of all n."""

    def number(key: str, value: object) -> gs.Constant:
        return constant(f"{name}/{key}", np.asarray(value))

    def node(op: str, inputs: list[gs.Tensor], key: str, dtype: object, **attrs: object) -> gs.Variable:
        return insert(graph, op, inputs, f"{name}/{key}", attrs=attrs, dtype=dtype)

    one = number("one", np.array([1], np.int64))
    wide = node("Cast", [offsets], "wide", np.int64, to=7)
    ends_of = [number("zero", np.array([0], np.int64)), number("last", np.array([-1], np.int64))]
    far = number("far", np.array([np.iinfo(np.int64).max], np.int64))
    starts = node("Unsqueeze", [node("Slice", [wide, *ends_of], "starts_", np.int64), one], "starts", np.int64)
    ends = node("Unsqueeze", [node("Slice", [wide, one, far], "ends_", np.int64), one], "ends", np.int64)
    rows = node("Shape", [x], "rows", np.int64, start=0, end=1)
    count = node("Squeeze", [rows], "count", np.int64)
    at = node("Range", [number("from", np.int64(0)), count, number("step", np.int64(1))], "at", np.int64)
    behind = node("Equal" if first else "GreaterOrEqual", [at, starts], "behind", np.bool_)
    inside = node("And", [behind, node("Less", [at, ends], "before", np.bool_)], "inside", np.bool_)
    weights = node("Cast", [inside], "belongs", np.float32, to=1)
    if first:
        return node("MatMul", [weights, x], "row", np.float32)
    lengths = node("Max", [node("Sub", [ends, starts], "lengths_", np.int64), one], "lengths", np.int64)
    share = node("Div", [weights, node("Cast", [lengths], "of", np.float32, to=1)], "share", np.float32)
    return node("MatMul", [share, x], "mean", np.float32)
