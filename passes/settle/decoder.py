"""A decoder's attention with nothing around it: the op rotates heads, and reads one product's output as it is."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from trimtab.passes.canonicalize.shapes import infer_shapes
from trimtab.passes.settle.heads import GQA, drop_reshapes
from trimtab.passes.settle.joined import join_pairs, join_projections
from trimtab.passes.settle.rotation import fuse_rotation


def tighten_decoder(graph: gs.Graph, max_tokens: int | None, *, gates: bool = True) -> int:
    """Make layers with GroupQueryAttention as few nodes as the op allows, in place; results are the same.

    Sums and norms stay apart: SkipSimplifiedLayerNormalization of ONNX Runtime 1.31 takes as long as both for a token,
    for 64 twice as long, and its sums of squares are several times less exact.

    Args:
        max_tokens: the longest text that the model takes, where that is known.
        gates: gate and up may become one product.

    Returns:
        how many rewrites.
    """
    attentions = [node for node in graph.nodes if (node.domain, node.op) == GQA]
    if not attentions:
        return 0
    infer_shapes(graph)  # passes do not tell all of them
    for node in attentions:
        q, y = node.inputs[0], node.outputs[0]
        if y.shape is None and node.inputs[1].name:  # nothing infers what ops of ONNX Runtime put out
            y.shape, y.dtype = q.shape, q.dtype
    infer_shapes(graph)
    rotated = fuse_rotation(graph, max_tokens)
    tightened = rotated + drop_reshapes(graph) + join_projections(graph)
    return tightened + (join_pairs(graph) if gates else 0)
