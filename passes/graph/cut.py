"""Cuts one graph behind chosen tensors into several that run one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.graph.order import topological


@dataclass(frozen=True)
class Segment:
    """A part of a graph. A tensor that crosses a cut is an output of one segment and, by name, an input of others.

    Attributes:
        graph: its inputs are inputs of the whole graph and outputs of earlier segments.
        points: names of the tensors at which the segment ends; the caller may change their values.
    """

    graph: gs.Graph
    points: tuple[str, ...]


def cut(graph: gs.Graph, points: Sequence[gs.Tensor]) -> list[Segment]:
    """Cut `graph` behind each of `points`: every node that depends on a point runs in a later segment.

    Points that do not depend on each other end the same segment. Each node runs in the earliest possible segment. A
    node that depends only on constants, such as a dequantized weight, belongs to every segment that reads it. The
    segments are copies that share the weights; `graph` does not change.

    Args:
        points: tensors that nodes of `graph` compute; outputs of the graph are allowed.

    Raises:
        ValueError: a point is not computed from the inputs of the graph.
    """
    nodes = topological(graph)
    level = _levels(graph, nodes, points)
    last = max(level.values(), default=0)
    inputs: list[dict[str, None]] = [{} for _ in range(last + 1)]  # ordered sets
    outputs: list[dict[str, None]] = [{} for _ in range(last + 1)]
    own = {id(tensor) for tensor in graph.inputs}
    computed_in = {id(tensor): level[id(node)] for node in nodes if id(node) in level for tensor in node.outputs}
    for node in nodes:
        if id(node) not in level:
            continue
        at = level[id(node)]
        for tensor in reads(node):
            if id(tensor) in own or computed_in.get(id(tensor), at) != at:
                inputs[at][tensor.name] = None
            if computed_in.get(id(tensor), at) != at:
                outputs[computed_in[id(tensor)]][tensor.name] = None
    for tensor in (*points, *graph.outputs):
        if id(tensor) not in own:
            outputs[computed_in.get(id(tensor), 0)][tensor.name] = None
    ends = [tuple(dict.fromkeys(t.name for t in points if computed_in[id(t)] == number)) for number in range(last + 1)]
    return [
        Segment(_part(graph, list(inputs[number]), list(outputs[number])), ends[number]) for number in range(last + 1)
    ]


def reads(node: gs.Node) -> Iterator[gs.Variable]:
    """The variables that `node` or its subgraphs read."""
    for tensor in node.inputs:
        if isinstance(tensor, gs.Variable) and tensor.name:
            yield tensor
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            for inner in value.nodes:
                yield from reads(inner)
            yield from (tensor for tensor in value.outputs if isinstance(tensor, gs.Variable))


def _levels(graph: gs.Graph, nodes: Sequence[gs.Node], points: Sequence[gs.Tensor]) -> dict[int, int]:
    """Node id → the number of its segment. Nodes that depend only on constants are absent."""
    cuts = {id(tensor) for tensor in points}
    level: dict[int, int] = {}
    ready = {id(tensor): 0 for tensor in graph.inputs}
    for node in nodes:
        befores = [ready[id(tensor)] for tensor in reads(node) if id(tensor) in ready]
        if befores:
            level[id(node)] = max(befores)
            ready |= {id(tensor): level[id(node)] + (id(tensor) in cuts) for tensor in node.outputs}
    graph_inputs = {id(tensor) for tensor in graph.inputs}
    for tensor in points:
        if id(tensor) not in ready or id(tensor) in graph_inputs:
            raise ValueError(f"{tensor.name!r} is not computed from the inputs of the graph")
    return level


def _part(graph: gs.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> gs.Graph:
    part = graph.copy()
    tensors = part.tensors()
    for name in inputs:
        tensors[name].inputs.clear()
    part.inputs, part.outputs = [tensors[name] for name in inputs], [tensors[name] for name in outputs]
    for tensor in (*part.inputs, *part.outputs):
        if tensor.dtype is None:  # tensors between layers are float32
            tensor.dtype = np.dtype(np.float32)
    part.cleanup()
    return part
