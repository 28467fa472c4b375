"""Mixtures of experts: a router sends each token to a few FFNs. Passes report them and leave them as they are."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.anatomy.scan import Scan, only_producer
from trimtab.passes.graph import output_name_of
from trimtab.passes.graph.linear import Linear

_MIXTURES = ("MoE", "QMoE")
"""Ops of com.microsoft that compute all experts at once: input, router's scores, weights [experts, ...]."""
_NEAR = 64  # nodes visited between the experts and their router


@dataclass(frozen=True)
class Experts:
    """The experts of one layer.

    Attributes:
        where: the node that gathers the weights of the experts chosen for a token.
        count: the number of experts; None if the graph does not state it.
        choice: the chosen experts' numbers or scores, a tensor that the router computes.
    """

    where: str
    count: int | None
    choice: gs.Tensor

    @property
    def why_left(self) -> str:
        """Why passes leave the experts as they are, for reports."""
        count = "" if self.count is None else f"{self.count} "
        return f"a mixture of {count}experts, of which each token takes its own; they stay as they are"


def find_experts(nodes: Sequence[gs.Node]) -> list[Experts]:
    """The experts of each layer, in the order of `nodes`.

    torch's exports gather matrices from weights [experts, rows, columns] by the numbers of a TopK, and multiply by
    them. Gathers by the same numbers, for the up and down projections, belong to one layer.
    """
    layers: dict[int, Experts] = {}
    for node in nodes:
        if node.op in _MIXTURES and node.domain == "com.microsoft":
            layers[id(node)] = Experts(output_name_of(node), _first_size(node.inputs[2]), node.inputs[1])
        elif _gathers_matrices(node) and any(before.op == "TopK" for before in _way_back(node.inputs[1])):
            numbers = node.inputs[1]
            layers.setdefault(id(numbers), Experts(output_name_of(node), _first_size(node.inputs[0]), numbers))
    return list(layers.values())


def _first_size(tensor: gs.Tensor) -> int | None:
    """The size of the first dimension; None if it is symbolic or unknown, as that of computed weights may be."""
    size = tensor.shape[0] if tensor.shape else None
    return int(size) if isinstance(size, (int, np.integer)) else None


def router(scan: Scan, experts: Experts) -> Linear | None:
    """The projection that scores the experts: the nearest one before `experts.choice`."""
    tensors = [experts.choice, *(tensor for node in _way_back(experts.choice) for tensor in node.inputs)]
    return next((linear for tensor in tensors if (linear := scan.producing(tensor)) is not None), None)


def _gathers_matrices(node: gs.Node) -> bool:
    """Whether `node` gathers whole matrices from a constant [experts, rows, columns], and products read them."""
    if node.op not in ("Gather", "GatherND") or node.attrs.get("axis", 0) or node.attrs.get("batch_dims", 0):
        return False
    table = node.inputs[0]
    stored = isinstance(table, gs.Constant) and len(table.shape) == 3
    return stored and any(reader.op in ("MatMul", "Transpose", "Einsum") for reader in node.outputs[0].outputs)


def _way_back(tensor: gs.Tensor) -> Iterator[gs.Node]:
    """The nodes that `tensor` depends on, the nearest first."""
    seen, queue = set[int](), deque([tensor])
    while queue and len(seen) < _NEAR:
        node = only_producer(queue.popleft())
        if node is not None and id(node) not in seen:
            seen.add(id(node))
            yield node
            queue.extend(node.inputs)
