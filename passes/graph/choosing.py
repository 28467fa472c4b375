"""What only chooses: nodes whose numbers decide which blocks, tokens or samples are computed, and reach no answer."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from trimtab.passes.graph.order import topological
from trimtab.plugins import KEEP_SAMPLES, KEEP_TOKENS, SELECT_BLOCKS

CHOOSERS = frozenset(op.name for op in (KEEP_SAMPLES, KEEP_TOKENS, SELECT_BLOCKS))
"""Ops that make numbers of blocks or rows out of scores."""


def choosing_nodes(graph: gs.Graph) -> list[gs.Node]:
    """Nodes in front of the ops that choose, all of whose results end there: a router, the predictor of a top-k.

    Rounding them spares little, and a score that falls to the other side of a threshold changes what is computed.
    """
    answers = {id(tensor) for tensor in graph.outputs}
    ends: set[int] = set()
    choosing: list[gs.Node] = []
    for node in reversed(topological(graph)):
        if node.op in CHOOSERS:
            ends.add(id(node))
            continue
        readers = [reader for tensor in node.outputs for reader in tensor.outputs]
        if readers and all(id(r) in ends for r in readers) and not any(id(t) in answers for t in node.outputs):
            ends.add(id(node))
            choosing.append(node)
    return choosing[::-1]
