"""GatherBlocks in standard ops."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_graphsurgeon as gs

from trimtab.plugins.gather_blocks import GATHER_BLOCKS
from trimtab.plugins.lowering import Nodes, Rows, like, type_of


def _gather_blocks(nodes: Nodes, node: gs.Node, inputs: Mapping[str, gs.Tensor]) -> list[gs.Tensor]:
    """Its y, [..., k · block]."""
    x = inputs["x"]
    chosen = Rows.of(nodes, inputs["blocks"], int(node.attrs["block"]), bool(node.attrs["at_most"]))
    flat = nodes("Reshape", x, nodes("Concat", [-1], nodes.size(x, -1), axis=0), dtype=type_of(x))
    numbers = nodes.tensor(chosen.numbers)
    size = nodes("Concat", nodes.size(flat, 0), nodes.size(numbers, -1), axis=0)
    places = nodes("Expand", numbers, size, dtype=type_of(numbers))
    gathered = nodes("GatherElements", flat, places, axis=1, dtype=type_of(x))
    return [like(nodes, chosen.only_taken(nodes, nodes("Unsqueeze", gathered, [1])), x)]


RULES = {GATHER_BLOCKS: _gather_blocks}
