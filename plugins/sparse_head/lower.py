"""SparseHead in standard ops."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_graphsurgeon as gs

from trimtab.plugins.lowering import Nodes, Rows, like, product, type_of
from trimtab.plugins.sparse_head import SPARSE_HEAD


def _sparse_head(nodes: Nodes, node: gs.Node, inputs: Mapping[str, gs.Tensor]) -> list[gs.Tensor]:
    """Its logits, [..., k]."""
    x = inputs["x"]
    logits = product(nodes, x, inputs, "weight", Rows.of(nodes, inputs["blocks"], 1))
    return [like(nodes, nodes.cast(logits, type_of(x)), x)]


RULES = {SPARSE_HEAD: _sparse_head}
