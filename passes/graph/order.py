"""Nodes in the order of computation, without recursion: graphsurgeon's own sort fails a thousand nodes deep."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs


def topological(graph: gs.Graph) -> list[gs.Node]:
    """The nodes of `graph`, each after the nodes it reads from. A right order stays. Subgraphs are not sorted.

    Raises:
        ValueError: the graph has a cycle.
    """
    own = {id(node) for node in graph.nodes}
    ordered: list[gs.Node] = []
    done: set[int] = set()
    opened: set[int] = set()
    for root in graph.nodes:
        if id(root) in done:
            continue
        opened.add(id(root))
        stack = [(root, _producers(root))]
        while stack:
            node, pending = stack[-1]
            for before in pending:
                if id(before) in done or id(before) not in own:
                    continue
                if id(before) in opened:
                    raise ValueError(f"the graph has a cycle through node {before.name!r}")
                opened.add(id(before))
                stack.append((before, _producers(before)))
                break
            else:
                stack.pop()
                done.add(id(node))
                ordered.append(node)
    return ordered


def _producers(node: gs.Node) -> Iterator[gs.Node]:
    """The nodes whose outputs `node` or its subgraphs read."""
    for tensor in node.inputs:
        yield from tensor.inputs
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            for inner in value.nodes:
                yield from _producers(inner)
            for tensor in value.outputs:
                yield from tensor.inputs
