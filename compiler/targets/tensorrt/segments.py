"""Cuts a model into several engines, and recomputes sizes, masks and positions in each of them."""

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
    """Cut `graph` between layers into `count` graphs of about equally many layers.

    Raises:
        TargetError: the graph has fewer layers.
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
    """Cut `graph` behind `points`. Each part recomputes sizes, masks and positions from the inputs.

    Otherwise they would cross the cuts as further tensors, and sizes would cross in host memory. Points always cross.
    """
    parts = [segment.graph for segment in cut(graph, points)]
    sides = _sides(graph, {tensor.name for tensor in points})
    for part in parts:
        _own_sides(part, sides)
    needed = {tensor.name for tensor in graph.outputs}
    for part in reversed(parts):
        part.outputs = [tensor for tensor in part.outputs if tensor.name in needed]
        part.cleanup()
        part.nodes = topological(part)
        needed |= {tensor.name for tensor in part.inputs}
    return parts


def _borders(graph: gs.Graph) -> list[gs.Tensor]:
    """The tensor that enters each layer, where the graph computes it."""
    return [block.x for block in find_anatomy(graph).blocks if block.x.inputs]


def _sides(graph: gs.Graph, points: AbstractSet[str]) -> dict[str, gs.Node]:
    """Tensor name → its node, for sizes, masks and positions: tensors that cheap ops compute from integer inputs.

    Args:
        points: names of tensors to leave out.
    """
    sides: dict[str, gs.Node] = {}
    input_names = {t.name for t in graph.inputs}
    integers = {t.name for t in graph.inputs if t.dtype is not None and np.dtype(t.dtype).kind in "iub"}
    for node in topological(graph):
        if len(node.outputs) != 1 or node.domain or node.op not in _CHEAP or node.outputs[0].name in points:
            continue
        if any(isinstance(t, gs.Constant) and np.prod(t.shape, dtype=np.int64) > _SMALL for t in node.inputs):
            continue
        parts = [t.name for t in node.inputs if isinstance(t, gs.Variable) and t.name]
        of_input = node.op == "Shape" and bool(parts) and parts[0] in input_names
        if of_input or (parts and all(name in sides or name in integers for name in parts)):
            sides[node.outputs[0].name] = node
    return sides


def _own_sides(part: gs.Graph, sides: dict[str, gs.Node]) -> None:
    """Recompute sizes, masks and positions (`sides`) inside `part`, so that they do not cross the cut."""
    tensors = part.tensors()
    pending = [tensor for tensor in part.inputs if tensor.name in sides]
    part.inputs = [tensor for tensor in part.inputs if tensor.name not in sides]
    while pending:
        tensor = pending.pop()
        node = sides[tensor.name]
        inputs: list[gs.Tensor] = []
        for source in node.inputs:
            own = tensors.get(source.name)
            if own is None or not source.name:
                own = (
                    source if isinstance(source, gs.Constant) else gs.Variable(source.name, source.dtype, source.shape)
                )
                tensors[source.name] = own
                if isinstance(source, gs.Constant):
                    own = tensors[source.name] = gs.Constant(source.name, source._values)
                elif source.name in sides:
                    pending.append(own)
                elif source.name:
                    part.inputs.append(own)
            inputs.append(own)
        part.nodes.append(gs.Node(node.op, node.name, attrs=dict(node.attrs), inputs=inputs, outputs=[tensor]))
