"""Nodes that only choose: their values decide which blocks, tokens or samples are computed, and reach no output."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from trimtab.passes.graph.order import topological
from trimtab.plugins import KEEP_SAMPLES, KEEP_TOKENS, SELECT_BLOCKS

CHOOSERS = frozenset(op.name for op in (KEEP_SAMPLES, KEEP_TOKENS, SELECT_BLOCKS))
"""Ops that turn scores into numbers of blocks or rows."""


def choosing_nodes(graph: gs.Graph) -> list[gs.Node]:
    """Nodes whose results only ops of `CHOOSERS` use: a router, the predictor of a top-k.

    Quantizing them saves little time, and a score that crosses a threshold changes which blocks are computed.
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
