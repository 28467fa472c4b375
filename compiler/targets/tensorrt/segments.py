"""Where a model is cut into several engines, and what of it each of them takes with it."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.errors import TargetError
from trimtab.passes.graph import topological
from trimtab.passes.graph.cut import cut

_CHEAP = frozenset([
    "Add", "And", "Cast", "Concat", "ConstantOfShape", "Cos", "CumSum", "Div", "Equal", "Expand", "Gather", "Greater",
    "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "MatMul", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or",
    "Range", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Shape", "Sin", "Slice", "Squeeze", "Sub",
    "Tile", "Transpose", "Trilu", "Unsqueeze", "Where",
])  # fmt: skip
_SMALL = 256  # elements of a constant that is copied into each part


def segments_of(graph: gs.Graph, count: int) -> list[gs.Graph]:
    """`graph` in `count` graphs that run one after the other, cut between layers, as even as they come.

    Raises:
        TargetError: it has fewer layers.
    """
    if count == 1:
        return [graph]
    borders = _borders(graph)
    if len(borders) < count:
        raise TargetError(
            f"engine.segments: {count} engines of a model in which {len(borders)} layers were found",
            hint="ask for fewer segments",
        )
    return cut_at(graph, [borders[round(number * len(borders) / count)] for number in range(1, count)])


def cut_at(graph: gs.Graph, points: Sequence[gs.Tensor]) -> list[gs.Graph]:
    """`graph` cut behind `points`. Each part makes sizes, masks and positions of the inputs by itself.

    They would cross the cuts as more tensors, and sizes in host memory. What is a point crosses all the same.
    """
    parts = [segment.graph for segment in cut(graph, points)]
    sides = _sides(graph, {tensor.name for tensor in points})
    for part in parts:
        _own_sides(part, sides)
    wanted = {tensor.name for tensor in graph.outputs}
    for part in reversed(parts):
        part.outputs = [tensor for tensor in part.outputs if tensor.name in wanted]
        part.cleanup()
        part.nodes = topological(part)
        wanted |= {tensor.name for tensor in part.inputs}
    return parts


def _borders(graph: gs.Graph) -> list[gs.Tensor]:
    """The tensor that enters each layer, where the graph computes it."""
    return [block.x for block in find_anatomy(graph).blocks if block.x.inputs]


def _sides(graph: gs.Graph, points: AbstractSet[str]) -> dict[str, gs.Node]:
    """Tensor name → the node that makes it, for sizes, masks and positions: all that cheap ops make of integers.

    Args:
        points: names of tensors that are none of them.
    """
    found: dict[str, gs.Node] = {}
    given = {t.name for t in graph.inputs}
    integers = {t.name for t in graph.inputs if t.dtype is not None and np.dtype(t.dtype).kind in "iub"}
    for node in topological(graph):
        if len(node.outputs) != 1 or node.domain or node.op not in _CHEAP or node.outputs[0].name in points:
            continue
        if any(isinstance(t, gs.Constant) and np.prod(t.shape, dtype=np.int64) > _SMALL for t in node.inputs):
            continue
        parts = [t.name for t in node.inputs if isinstance(t, gs.Variable) and t.name]
        of_input = node.op == "Shape" and bool(parts) and parts[0] in given
        if of_input or (parts and all(name in found or name in integers for name in parts)):
            found[node.outputs[0].name] = node
    return found


def _own_sides(part: gs.Graph, sides: dict[str, gs.Node]) -> None:
    """Let `part` compute by itself what it would be handed of `sides`."""
    known = part.tensors()
    pending = [tensor for tensor in part.inputs if tensor.name in sides]
    part.inputs = [tensor for tensor in part.inputs if tensor.name not in sides]
    while pending:
        tensor = pending.pop()
        node = sides[tensor.name]
        inputs: list[gs.Tensor] = []
        for source in node.inputs:
            own = known.get(source.name)
            if own is None or not source.name:
                own = (
                    source if isinstance(source, gs.Constant) else gs.Variable(source.name, source.dtype, source.shape)
                )
                known[source.name] = own
                if isinstance(source, gs.Constant):
                    own = known[source.name] = gs.Constant(source.name, source._values)
                elif source.name in sides:
                    pending.append(own)
                elif source.name:
                    part.inputs.append(own)
            inputs.append(own)
        part.nodes.append(gs.Node(node.op, node.name, attrs=dict(node.attrs), inputs=inputs, outputs=[tensor]))
