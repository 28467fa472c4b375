"""Tightens a decoder's attention: the op rotates heads itself, and reads the output of one product."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from trimtab.passes.canonicalize.shapes import infer_shapes
from trimtab.passes.settle.heads import attentions, drop_reshapes
from trimtab.passes.settle.joined import join_pairs, join_projections
from trimtab.passes.settle.rotation import fuse_rotation


def tighten_decoder(graph: gs.Graph, max_tokens: int | None, *, gates: bool = True, glu: bool = False) -> int:
    """Reduce layers with GroupQueryAttention to the fewest nodes that the op allows, in place; results are the same.

    Sums and norms are not fused: SkipSimplifiedLayerNormalization of ONNX Runtime 1.31 takes as long as both for one
    token, twice as long for 64, and its sums of squares are several times less exact.

    Args:
        max_tokens: tokens of the longest text, including its past; None if there is no known limit.
        gates: gate and up may become one product.
        glu: gate and up may become the op Glu, for which a kernel is available.

    Returns:
        the number of rewrites.
    """
    attention_nodes = attentions(graph)
    if not attention_nodes:
        return 0
    infer_shapes(graph)  # passes do not set all shapes
    unknown = [node for node in attention_nodes if node.outputs[0].shape is None and node.inputs[1].name]
    for node in unknown:  # shape inference does not know ONNX Runtime's ops
        node.outputs[0].shape, node.outputs[0].dtype = node.inputs[0].shape, node.inputs[0].dtype
    if unknown:
        infer_shapes(graph)
    rotated = fuse_rotation(graph, max_tokens)
    tightened = rotated + drop_reshapes(graph) + join_projections(graph)
    return tightened + (join_pairs(graph, glu=glu) if gates else 0)
