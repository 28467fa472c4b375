"""Checks the names of an ONNX graph: each is defined once, every used name is defined, and there is no cycle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from onnx import GraphProto, NodeProto

from trimtab.passes.graph.wellformed.fault import MalformedError, name_of
from trimtab.passes.graph.wellformed.nodes import subgraphs, where


def check_scope(
    nodes: Sequence[NodeProto], defined: Iterable[str], outputs: Iterable[str], outer: frozenset[str] = frozenset()
) -> None:
    """Check that exactly one input, weight or node defines each name in `nodes` and `outputs`, without a cycle.

    Subgraphs of the nodes are not checked, except for the names of this scope that they use.

    Args:
        defined: names of inputs and weights.
        outer: names that surrounding graphs define.

    Raises:
        MalformedError: the message names the tensor or the node.
    """
    defined = frozenset(defined)
    producer: dict[str, int] = {}
    for place, node in enumerate(nodes):
        for name in filter(None, node.output):
            if name in producer or name in defined:
                raise MalformedError(f"tensor {name_of(name)} is given twice, the second time by {where(node)}")
            producer[name] = place
    readers: list[list[int]] = [[] for _ in nodes]
    waiting = [0] * len(nodes)
    for place, node in enumerate(nodes):
        needed = set(filter(None, node.input)) | set(_captured(node))
        for name in needed:
            if name in producer:
                readers[producer[name]].append(place)
                waiting[place] += 1
            elif name not in defined and name not in outer and name in node.input:
                raise MalformedError(f"nothing gives the tensor {name_of(name)} that {where(node)} uses")
    ready = [place for place, count in enumerate(waiting) if not count]
    for done in ready:  # grows while it is read
        for reader in readers[done]:
            waiting[reader] -= 1
            if not waiting[reader]:
                ready.append(reader)
    if len(ready) < len(nodes):
        stuck = next(node for node, count in zip(nodes, waiting, strict=True) if count)
        raise MalformedError(f"the graph has a cycle in front of {where(stuck)}")
    for name in outputs:
        if name not in producer and name not in defined and name not in outer:
            raise MalformedError(f"nothing gives the output {name_of(name)}")


def given_names(graph: GraphProto) -> list[str]:
    """Names of the inputs and weights of `graph`."""
    sparse = [each.values.name for each in graph.sparse_initializer]
    return [*(each.name for each in graph.input), *(each.name for each in graph.initializer), *sparse]


def names(graph: GraphProto) -> frozenset[str]:
    """All names that `graph` defines, which its subgraphs may use."""
    return frozenset(given_names(graph)) | {name for node in graph.node for name in node.output}


def _captured(node: NodeProto) -> Iterator[str]:
    """Names from outside that the subgraphs of `node` use."""
    for graph in subgraphs(node):
        inside = names(graph)
        for inner in graph.node:
            yield from (name for name in (*inner.input, *_captured(inner)) if name and name not in inside)
        yield from (each.name for each in graph.output if each.name not in inside)
