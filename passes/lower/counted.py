"""Lowers ops whose output size is counted at run time to ops that TensorRT's parser supports."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.errors import ModelError
from trimtab.plugins.lowering import Nodes, onnx_type

Rule = Callable[[Nodes, gs.Node], list[gs.Tensor | None]]
_END = np.iinfo(np.int64).max


def _places(nodes: Nodes, flags: gs.Tensor) -> gs.Variable:
    """The indices of nonzero `flags` [n], ascending, [counted], int64.

    The running sum of flags is the position of an index in the result. Other indices are written to a spare position
    at the end, and a slice up to the last sum removes it.
    """
    chosen = nodes("Cast", flags, dtype=np.bool_, to=onnx_type(np.bool_))
    count = nodes("Shape", flags)
    sums = nodes("CumSum", nodes.cast(chosen, np.dtype(np.int64)), 0)
    before = nodes("Concat", [0], sums, axis=0)
    new = nodes("Slice", before, [0], [-1], [0])
    to = nodes("Where", chosen, new, count, dtype=np.int64)
    own = nodes("Range", 0, nodes("Squeeze", count, dtype=np.int64), 1, dtype=np.int64)
    room = nodes("Expand", [0], nodes("Add", count, [1]))
    placed = nodes("ScatterElements", room, to, own, axis=0)
    return nodes("Slice", placed, [0], nodes("Slice", before, [-1], [_END], [0]), [0])


def _non_zero(nodes: Nodes, node: gs.Node) -> list[gs.Tensor | None]:
    (x,) = node.inputs
    if not x.shape:
        raise ModelError(
            f"{node.name or node.outputs[0].name}: the rank of its input is not known",
            hint="export the model again",
        )
    axes = len(x.shape)
    places = _places(nodes, x if axes == 1 else nodes("Reshape", x, [-1], dtype=x.dtype))
    if axes == 1:
        return [nodes("Unsqueeze", places, [0])]
    rows: list[gs.Tensor] = []
    for axis in reversed(range(axes)):
        size = nodes("Max", nodes.size(x, axis), [1])  # ONNX Runtime divides by the size even of an empty tensor
        rows.insert(0, nodes("Unsqueeze", nodes("Mod", places, size, dtype=np.int64), [0]))
        places = nodes("Div", places, size)
    return [nodes("Concat", *rows, axis=0)]


def _compress(nodes: Nodes, node: gs.Node) -> list[gs.Tensor | None]:
    x, condition = node.inputs
    axis = node.attrs.get("axis")
    source = nodes("Reshape", x, [-1], dtype=x.dtype) if axis is None else x
    return [nodes("Gather", source, _places(nodes, condition), axis=int(axis or 0), dtype=x.dtype)]


RULES: dict[str, Rule] = {"NonZero": _non_zero, "Compress": _compress}
"""Op → the rule that computes its output."""
