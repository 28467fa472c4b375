"""SparseDown in standard ops."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_graphsurgeon as gs

from trimtab.plugins.lowering import Nodes, Rows, Weight, like, type_of
from trimtab.plugins.sparse_down import SPARSE_DOWN


def _sparse_down(nodes: Nodes, node: gs.Node, inputs: Mapping[str, gs.Tensor]) -> list[gs.Tensor]:
    """Its y, [..., width]."""
    h = inputs["h"]
    chosen = Rows.of(nodes, inputs["blocks"], int(node.attrs["block"]), bool(node.attrs["at_most"]))
    down = Weight.of(nodes, chosen, inputs, "down", h)
    flat = nodes("Reshape", h, nodes("Concat", [-1, 1], nodes.size(h, -1), axis=0), dtype=type_of(h))
    flat = chosen.only_taken(nodes, flat)
    if down.scale is not None:
        flat = nodes("Mul", flat, down.scale)
    y = nodes("MatMul", nodes.cast(flat, down.dtype), down.rows, dtype=down.dtype)
    return [like(nodes, nodes.cast(y, type_of(h)), h)]


RULES = {SPARSE_DOWN: _sparse_down}
