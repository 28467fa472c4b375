"""One graph into several that run one after the other, cut behind chosen tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.graph.order import topological


@dataclass(frozen=True)
class Segment:
    """A part of a graph. What crosses a cut is an output of one segment and an input of others, by its name.

    Attributes:
        graph: its inputs are the whole graph's that it reads, and what earlier segments hand on.
        points: names of the tensors behind which it ends, for whoever runs it to do something to them.
    """

    graph: gs.Graph
    points: tuple[str, ...]


def cut(graph: gs.Graph, points: Sequence[gs.Tensor]) -> list[Segment]:
    """Cut `graph` behind each of `points`: all that reads one, at whatever distance, runs in a later segment.

    Points that do not depend on each other end the same segment. Everything runs as early as it can, but what depends
    on constants alone, such as a dequantized weight, which belongs to every segment that reads it. The segments are
    copies that share the weights; `graph` stays as it is.

    Args:
        points: tensors that nodes of `graph` compute. One that is an output of the graph may be cut behind too.

    Raises:
        ValueError: a point is no tensor that the graph computes of its inputs.
    """
    nodes = topological(graph)
    level = _levels(graph, nodes, points)
    last = max(level.values(), default=0)
    inputs: list[dict[str, None]] = [{} for _ in range(last + 1)]  # ordered sets
    outputs: list[dict[str, None]] = [{} for _ in range(last + 1)]
    own = {id(tensor) for tensor in graph.inputs}
    made = {id(tensor): level[id(node)] for node in nodes if id(node) in level for tensor in node.outputs}
    for node in nodes:
        if id(node) not in level:
            continue
        at = level[id(node)]
        for tensor in reads(node):
            if id(tensor) in own or made.get(id(tensor), at) != at:
                inputs[at][tensor.name] = None
            if made.get(id(tensor), at) != at:
                outputs[made[id(tensor)]][tensor.name] = None
    for tensor in (*points, *graph.outputs):
        if id(tensor) not in own:
            outputs[made.get(id(tensor), 0)][tensor.name] = None
    ends = [tuple(dict.fromkeys(t.name for t in points if made[id(t)] == number)) for number in range(last + 1)]
    return [
        Segment(_part(graph, list(inputs[number]), list(outputs[number])), ends[number]) for number in range(last + 1)
    ]


def reads(node: gs.Node) -> Iterator[gs.Variable]:
    """The variables that `node` reads, itself or in a subgraph."""
    for tensor in node.inputs:
        if isinstance(tensor, gs.Variable) and tensor.name:
            yield tensor
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            for inner in value.nodes:
                yield from reads(inner)
            yield from (tensor for tensor in value.outputs if isinstance(tensor, gs.Variable))


def _levels(graph: gs.Graph, nodes: Sequence[gs.Node], points: Sequence[gs.Tensor]) -> dict[int, int]:
    """Node id → the segment it runs in. What depends on constants alone has none."""
    cuts = {id(tensor) for tensor in points}
    level: dict[int, int] = {}
    ready = {id(tensor): 0 for tensor in graph.inputs}
    for node in nodes:
        befores = [ready[id(tensor)] for tensor in reads(node) if id(tensor) in ready]
        if befores:
            level[id(node)] = max(befores)
            ready |= {id(tensor): level[id(node)] + (id(tensor) in cuts) for tensor in node.outputs}
    given = {id(tensor) for tensor in graph.inputs}
    for tensor in points:
        if id(tensor) not in ready or id(tensor) in given:
            raise ValueError(f"{tensor.name!r} is no tensor that the graph computes of its inputs")
    return level


def _part(graph: gs.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> gs.Graph:
    part = graph.copy()
    tensors = part.tensors()
    for name in inputs:
        tensors[name].inputs.clear()
    part.inputs, part.outputs = [tensors[name] for name in inputs], [tensors[name] for name in outputs]
    for tensor in (*part.inputs, *part.outputs):
        if tensor.dtype is None:  # as everything between the layers of a model
            tensor.dtype = np.dtype(np.float32)
    part.cleanup()
    return part
