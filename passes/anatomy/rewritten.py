"""FFNs that a pass has rewritten: the projections that they now consist of, for further passes."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from trimtab.passes.anatomy.model import Anatomy
from trimtab.passes.graph.linear import Linear, match_linear
from trimtab.passes.graph.order import topological
from trimtab.passes.graph.packed_batch import readers_behind
from trimtab.plugins import DOMAIN

__all__ = ["Rewritten", "find_rewritten"]


@dataclass(frozen=True)
class Rewritten:
    """The projections of a layer that belong neither to its attention nor to a recognised FFN.

    Attributes:
        layer: the layer's number, under which a Profile stores the original FFN.
        x: the input of the first projection, which is the input of the original FFN.
        linears: the projections, in the order of computation.
        ops: the dialect's ops in the layer, which compute a part of the original FFN.
    """

    layer: int
    x: gs.Tensor
    linears: tuple[Linear, ...]
    ops: tuple[str, ...]

    @property
    def where(self) -> str:
        return f"layer {self.layer} FFN"


def find_rewritten(graph: gs.Graph, anatomy: Anatomy) -> list[Rewritten]:
    """One entry per layer without a recognised FFN; empty where FFNs are not numbered like the layers."""
    if any(block.ffn is not None and block.ffn.layer != block.layer for block in anatomy.blocks):
        return []
    of_attentions = {
        id(node) for attention in anatomy.attentions for linear in attention.linears for node in linear.nodes
    }
    of_attentions |= {id(node) for attention in anatomy.attentions for node in attention.nodes}
    rewritten: list[Rewritten] = []
    nodes = topological(graph)
    for block in anatomy.blocks:
        if block.ffn is not None:
            continue
        own = [node for node in nodes if id(node) in block.nodes and id(node) not in of_attentions]
        if block.middle is not None:
            behind = {id(node) for node in readers_behind(graph, block.middle)}
            own = [node for node in own if id(node) in behind]
        linears = tuple(linear for node in own if (linear := match_linear(node)) is not None)
        ops = tuple(node.op for node in own if node.domain == DOMAIN)
        if linears:
            rewritten.append(Rewritten(block.layer, linears[0].x, linears, ops))
    return rewritten
