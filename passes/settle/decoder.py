"""A decoder's attention with nothing around it: the op rotates heads, and reads one product's output as it is."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from trimtab.passes.canonicalize.shapes import infer_shapes
from trimtab.passes.settle.heads import attentions, drop_reshapes
from trimtab.passes.settle.joined import join_pairs, join_projections
from trimtab.passes.settle.rotation import fuse_rotation


def tighten_decoder(graph: gs.Graph, max_tokens: int | None, *, gates: bool = True, glu: bool = False) -> int:
    """Make layers with GroupQueryAttention as few nodes as the op allows, in place; results are the same.

    Sums and norms stay apart: SkipSimplifiedLayerNormalization of ONNX Runtime 1.31 takes as long as both for a token,
    for 64 twice as long, and its sums of squares are several times less exact.

    Args:
        max_tokens: of the longest text that may be run, its past included; None where no limit is known.
        gates: gate and up may become one product.
        glu: and what is made of both the op Glu: a kernel of it is there.

    Returns:
        how many rewrites.
    """
    found = attentions(graph)
    if not found:
        return 0
    infer_shapes(graph)  # passes do not tell all of them
    unknown = [node for node in found if node.outputs[0].shape is None and node.inputs[1].name]
    for node in unknown:  # nothing infers what ops of ONNX Runtime put out
        node.outputs[0].shape, node.outputs[0].dtype = node.inputs[0].shape, node.inputs[0].dtype
    if unknown:
        infer_shapes(graph)
    rotated = fuse_rotation(graph, max_tokens)
    tightened = rotated + drop_reshapes(graph) + join_projections(graph)
    return tightened + (join_pairs(graph, glu=glu) if gates else 0)
