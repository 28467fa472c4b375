"""Matches attention blocks: a Softmax between two products, or one fused op, with the projections around them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import onnx_graphsurgeon as gs

from trimtab.passes.anatomy.model import Attention
from trimtab.passes.anatomy.scan import NORMS, Scan, keeps_rows, only_producer
from trimtab.passes.graph.linear import Linear
from trimtab.passes.graph.shapes import entries

_FUSED = {
    ("", "Attention"): ("q_num_heads", "kv_num_heads"),
    ("com.microsoft", "Attention"): ("num_heads", "num_heads"),
    ("com.microsoft", "MultiHeadAttention"): ("num_heads", "num_heads"),
    ("com.microsoft", "DecoderMaskedMultiHeadAttention"): ("num_heads", "num_heads"),
    ("com.microsoft", "GroupQueryAttention"): ("num_heads", "kv_num_heads"),
    ("trimtab", "PackedAttention"): ("heads", "kv_heads"),
}
"""Op → its attributes that hold the numbers of heads and of key-value heads."""

_FIRST = NORMS | {
    "Cast", "Expand", "Gather", "Identity", "Reshape", "RotaryEmbedding", "Slice", "Split", "Squeeze", "Tile",
    "Transpose", "Unsqueeze",
}  # fmt: skip  # data flows through their first input
_ALL = frozenset(["Add", "Concat", "Div", "Mul", "Neg", "Pow", "Reciprocal", "ReduceMean", "Sqrt", "Sub", "Where"])
_SCORES = frozenset([
    "Add", "Cast", "Clip", "Concat", "Div", "Expand", "Identity", "Mul", "Reshape", "Slice", "Sub", "Tanh", "Where",
])  # fmt: skip
_WEIGHTS = frozenset(["Cast", "Dropout", "Identity", "Mul", "Reshape", "Slice", "Where"])
_TO_OUT = NORMS | {"Cast", "Identity", "Mul", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
_NEAR = 256  # nodes visited on each path


def find_attentions(scan: Scan) -> list[Attention]:
    """All attention blocks in the order of computation."""
    attentions: list[Attention] = []
    for node in scan.nodes:
        if (node.domain or "", node.op) in _FUSED:
            attentions.append(_fused(scan, node, len(attentions)))
        elif node.op == "Softmax":
            attention = _plain(scan, node, len(attentions))
            if attention is not None:
                attentions.append(attention)
    return attentions


def _plain(scan: Scan, softmax: gs.Node, layer: int) -> Attention | None:
    way = [softmax]
    scores = _product_before(scan, softmax.inputs[0], way)
    mixed = _product_after(softmax.outputs[0], way)
    if scores is None or mixed is None:
        return None
    way += [scores, mixed]
    q, k = (_source(scan, tensor, way) for tensor in scores.inputs[:2])
    v = _source(scan, mixed.inputs[1], way)
    out = _reader(scan, mixed.outputs[0], way)
    if q is None and k is None and v is None:
        return None
    head_dim = _last_size(scores.inputs[0]) or _split_size(way, q, packed=q is k)
    heads = _heads(scores.inputs[0], head_dim, q, k, out)
    return Attention(
        layer,
        q,
        k,
        v,
        out,
        heads,
        _kv_heads(heads, head_dim, q, k, v),
        head_dim,
        scan.ordered(way),
        _weighing(mixed.inputs[0]),
        None,
    )


def _fused(scan: Scan, node: gs.Node, layer: int) -> Attention:
    way = [node]
    inputs = [tensor for tensor in node.inputs[:3] if tensor.name]
    own_weights = node.op == "Attention" and node.domain == "com.microsoft"
    sources = [] if own_weights else [_source(scan, tensor, way) for tensor in inputs]
    q, k, v = (sources + sources[:1] * 2)[:3] if len(sources) in (1, 3) else (None, None, None)
    out = _reader(scan, node.outputs[0], way)
    names = _FUSED[node.domain or "", node.op]
    heads, kv_heads = (int(node.attrs[name]) if name in node.attrs else None for name in names)
    shape = inputs[0].shape
    head_dim = None
    if shape is not None and len(shape) == 4:
        heads = heads or (shape[1] if isinstance(shape[1], int) else None)
        head_dim = _last_size(inputs[0])
    elif own_weights and heads:
        head_dim = int(inputs[1].shape[1]) // 3 // heads
    elif heads and out is not None:
        head_dim = out.in_features // heads
    elif heads and q is not None and q is not k:
        head_dim = q.out_features // heads
    heads = heads or (out.in_features // head_dim if out is not None and head_dim else None)
    kv_heads = kv_heads or _kv_heads(heads, head_dim, q, k, v)
    return Attention(layer, q, k, v, out, heads, kv_heads, head_dim, scan.ordered(way), None, node.op)


def _before(node: gs.Node, first: frozenset[str], everything: frozenset[str]) -> list[gs.Tensor]:
    if node.op in first:
        return list(node.inputs[:1])
    return list(node.inputs) if node.op in everything else []


def _backwards(tensor: gs.Tensor) -> Iterator[tuple[gs.Tensor, gs.Node, deque[gs.Tensor]]]:
    """Breadth first from `tensor` back: each tensor, its producer, and the queue for earlier tensors."""
    seen: set[int] = set()
    queue = deque([tensor])
    while queue and len(seen) < _NEAR:
        current = queue.popleft()
        node = only_producer(current)
        if node is not None and id(current) not in seen:
            seen.add(id(current))
            yield current, node, queue


def _product_before(scan: Scan, tensor: gs.Tensor, way: list[gs.Node]) -> gs.Node | None:
    """The product of two computed tensors that the scores come from."""
    for _, node, queue in _backwards(tensor):
        if node.op in ("MatMul", "FusedMatMul", "Einsum"):
            if not any(isinstance(t, gs.Constant) for t in node.inputs):
                return node
        elif node.op in _SCORES:
            way.append(node)
            queue.extend(node.inputs[:1] if node.op in ("Reshape", "Expand", "Slice") else node.inputs)
    return None


def _product_after(tensor: gs.Tensor, way: list[gs.Node]) -> gs.Node | None:
    """The product that applies the attention weights to the values."""
    queue = deque([tensor])
    for _ in range(_NEAR):
        if not queue:
            return None
        current = queue.popleft()
        for node in current.outputs:
            if node.op in ("MatMul", "FusedMatMul", "Einsum"):
                return node if node.inputs[0] is current and not isinstance(node.inputs[1], gs.Constant) else None
            if node.op in _WEIGHTS:
                way.append(node)
                queue.extend(node.outputs)
    return None


def _weighing(tensor: gs.Tensor) -> gs.Tensor:
    """The attention probabilities, before casts and changes of shape."""
    while (node := only_producer(tensor)) is not None and node.op in ("Cast", "Dropout", "Identity", "Reshape"):
        tensor = node.inputs[0]
    return tensor


def _source(scan: Scan, tensor: gs.Tensor, way: list[gs.Node]) -> Linear | None:
    """The nearest projection before `tensor`, through reshaping, scaling and rotary embedding."""
    nearest: Linear | None = None
    for current, node, queue in _backwards(tensor):
        linear = scan.producing(current)
        if linear is not None:
            nearest = nearest or linear
            continue
        sources = _before(node, _FIRST, _ALL)
        if sources:
            way.append(node)
            queue.extend(sources)
    return nearest


def _reader(scan: Scan, tensor: gs.Tensor, way: list[gs.Node]) -> Linear | None:
    """The nearest projection after `tensor`, through reshaping."""
    queue = deque([tensor])
    for _ in range(_NEAR):
        if not queue:
            return None
        current = queue.popleft()
        linear = scan.reading(current)
        if linear is not None:
            return linear
        for node in current.outputs:
            if (node.op in _TO_OUT or keeps_rows(node)) and node.inputs[0] is current:
                way.append(node)
                queue.extend(node.outputs)
    return None


def _last_size(tensor: gs.Tensor) -> int | None:
    size = tensor.shape[-1] if tensor.shape else None
    return size if isinstance(size, int) else None


def _split_size(way: list[gs.Node], q: Linear | None, packed: bool) -> int | None:
    """The head size, read from the Reshape that splits `q` (or its part of a packed projection) into heads.

    A packed projection that is reshaped to four axes as a whole stores q, k and v per head: three times the size.
    """
    for node in way:
        if q is None or node.op != "Reshape":
            continue
        source = only_producer(node.inputs[0])
        piece = packed and source is not None and source.op in ("Slice", "Split") and source.inputs[0] is q.y
        sizes = entries(node.inputs[1]) if piece or node.inputs[0] is q.y else None
        if sizes and len(sizes) > 3 and isinstance(sizes[-1], int) and sizes[-1] > 0:
            return sizes[-1] // 3 if packed and not piece and len(sizes) == 4 else sizes[-1]
    return None


def _heads(
    operand: gs.Tensor, head_dim: int | None, q: Linear | None, k: Linear | None, out: Linear | None
) -> int | None:
    shape = operand.shape
    if shape is not None and len(shape) == 4 and isinstance(shape[1], int):
        return shape[1]
    width = q.out_features if q is not None and q is not k else out.in_features if out is not None else None
    return width // head_dim if width is not None and head_dim else None


def _kv_heads(
    heads: int | None, head_dim: int | None, q: Linear | None, k: Linear | None, v: Linear | None
) -> int | None:
    if head_dim is None or k is None:
        return None
    if k is q:
        return (k.out_features // head_dim - heads) // 2 if heads is not None else None
    return k.out_features // head_dim // (2 if k is v else 1)
