"""A graph indexed for matching: order of computation, and every Linear by its tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Literal

import onnx_graphsurgeon as gs

from trimtab.passes.graph import topological
from trimtab.passes.graph.linear import Linear, match_linear

NORMS = frozenset(
    ["LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "GroupNormalization", "LpNormalization"]
)
SKIP_NORMS = frozenset(["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])


class Scan:
    """Read-only index of a graph. Tensors and nodes are compared by identity, never by name.

    Attributes:
        nodes: all nodes, in topological order.
        linears: all projections, in the order of their outputs.
    """

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.nodes = topological(graph)
        self.position = {id(node): i for i, node in enumerate(self.nodes)}
        matched = (match_linear(node) for node in self.nodes)
        self.linears = sorted((m for m in matched if m is not None), key=lambda m: self.position[id(m.nodes[-1])])
        self._by_output = {id(linear.y): linear for linear in self.linears}
        self._by_input: dict[int, Linear] = {}
        for linear in self.linears:
            self._by_input.setdefault(id(linear.x), linear)

    def producing(self, tensor: gs.Tensor) -> Linear | None:
        """The Linear whose y is `tensor`."""
        return self._by_output.get(id(tensor))

    def reading(self, tensor: gs.Tensor) -> Linear | None:
        """The first Linear whose x is `tensor`."""
        return self._by_input.get(id(tensor))

    def ordered(self, nodes: Iterable[gs.Node]) -> tuple[gs.Node, ...]:
        """`nodes`, each once, in topological order."""
        return tuple(sorted({id(n): n for n in nodes}.values(), key=lambda n: self.position[id(n)]))

    def downstream(self, tensors: Iterable[gs.Tensor]) -> set[int]:
        """Ids of all nodes that depend on any of `tensors`."""
        return _reached(tensors, "outputs")

    def upstream(self, tensors: Iterable[gs.Tensor]) -> set[int]:
        """Ids of all nodes that any of `tensors` depends on."""
        return _reached(tensors, "inputs")


def _reached(tensors: Iterable[gs.Tensor], side: Literal["inputs", "outputs"]) -> set[int]:
    """Ids of the nodes reached from `tensors` by following `side` of tensors and nodes."""
    seen: set[int] = set()
    queue = deque(tensors)
    while queue:
        for node in getattr(queue.popleft(), side):
            if id(node) not in seen:
                seen.add(id(node))
                queue.extend(getattr(node, side))
    return seen


def keeps_rows(node: gs.Node) -> bool:
    """True for a Gather of the rows that remain when tokens or samples leave a packed batch."""
    rows = only_producer(node.inputs[1]) if node.op == "Gather" else None
    return rows is not None and rows.op in ("KeepSamples", "KeepTokens")


def only_producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that makes `tensor`, or None for constants and graph inputs."""
    return tensor.inputs[0] if len(tensor.inputs) == 1 else None
