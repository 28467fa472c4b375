"""Writes the sizes of a decoder's cache into inputs that have only symbols for them."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from trimtab.passes.anatomy import find_anatomy

_CACHE = {
    ("", "Attention"): slice(4, 6),
    ("com.microsoft", "GroupQueryAttention"): slice(3, 5),
    ("com.microsoft", "MultiHeadAttention"): slice(6, 8),
    ("com.microsoft", "DecoderMaskedMultiHeadAttention"): slice(5, 7),
}
"""Attention → its inputs with past keys and values."""

_HEADS, _LENGTH, _WIDTH = 1, 2, 3
"""Axes of keys and values, [batch, heads, past, width]; the projections of attention fix the first and the last."""


def size_caches(graph: gs.Graph) -> int:
    """Write heads and width into the shapes of inputs with past keys and values; returns the number of sizes.

    ONNX Runtime GenAI's builder writes a symbol for the width, though the weights determine it. A symbol becomes the
    same size everywhere.
    """
    unsized = {id(tensor) for tensor in graph.inputs if _has_open_heads(tensor)}
    if not unsized:
        return 0
    sizes: dict[str, int] = {}
    count = 0
    for attention in find_anatomy(graph).attentions:
        for past in (t for node in attention.nodes for t in _cached(node) if id(t) in unsized):
            shape = list(past.shape)
            for axis, size in ((_HEADS, attention.kv_heads), (_WIDTH, attention.head_dim)):
                if size is not None and not isinstance(shape[axis], int):
                    sizes |= {shape[axis]: size} if shape[axis] else {}
                    shape[axis] = size
                    count += 1
            past.shape = shape
    for tensor in (tensor for tensor in (*graph.inputs, *graph.outputs) if tensor.shape is not None):
        tensor.shape = [sizes.get(size, size) if isinstance(size, str) else size for size in tensor.shape]
    return count


def _has_open_heads(tensor: gs.Tensor) -> bool:
    shape = tensor.shape
    return shape is not None and len(shape) == 4 and not all(isinstance(shape[axis], int) for axis in (_HEADS, _WIDTH))


def _cached(node: gs.Node) -> Iterator[gs.Tensor]:
    """The inputs of `node` with past keys or values."""
    if node.op == "Concat" and node.attrs.get("axis") in (_LENGTH, _LENGTH - 4):
        yield node.inputs[0]
    else:
        yield from node.inputs[_CACHE.get((node.domain or "", node.op), slice(0, 0))]
