"""FFNs that a pass has rewritten into other projections: what is left of them to rewrite further."""

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
    """The projections of a layer that belong to neither its attention nor an FFN that is recognised.

    Attributes:
        layer: its number, by which a Profile knows the FFN that it had.
        x: what the first of them reads, which is the input of that FFN.
        linears: in the order of computation.
        ops: ops of the dialect beside them, which compute a part of what the FFN did.
    """

    layer: int
    x: gs.Tensor
    linears: tuple[Linear, ...]
    ops: tuple[str, ...]

    @property
    def where(self) -> str:
        return f"layer {self.layer} FFN"


def find_rewritten(graph: gs.Graph, anatomy: Anatomy) -> list[Rewritten]:
    """Of all layers in which no FFN is recognised; none where FFNs are not numbered as the layers are."""
    if any(block.ffn is not None and block.ffn.layer != block.layer for block in anatomy.blocks):
        return []
    of_attentions = {
        id(node) for attention in anatomy.attentions for linear in attention.linears for node in linear.nodes
    }
    of_attentions |= {id(node) for attention in anatomy.attentions for node in attention.nodes}
    found: list[Rewritten] = []
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
            found.append(Rewritten(block.layer, linears[0].x, linears, ops))
    return found
