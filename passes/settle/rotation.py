"""Moves rotary embeddings into the attention op, with tables of all positions."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.anatomy.scan import only_producer
from trimtab.passes.graph import constant
from trimtab.passes.graph.part import nodes_between, run_part
from trimtab.passes.settle.heads import attentions, before_transpose, heads_joined

_BY_POSITION = frozenset(["Cast", "Concat", "Cos", "Mul", "Sin", "Slice", "Transpose", "Unsqueeze"])
"""Ops from which exporters compute angles."""

_MAX_BYTES = 1 << 26  # of a table; with longer texts, the rotation stays outside
_UNIT = 16  # ONNX Runtime 1.31 rotates heads whose size is a multiple of this, in halves that are multiples of 8
_ROTARY = slice(7, 10)  # the op's inputs for tables and positions
_CALLS = ((2, 0, 5), (1, 3, 4))  # batch, past, tokens


@dataclass(frozen=True)
class _Rotated:
    """A RotaryEmbedding in front of attention.

    Attributes:
        x: the tensor that it rotates, [B, T, heads, D].
        cos, sin: [B, T, R / 2].
        interleaved: whether it rotates neighbouring features, not the halves of a head.
    """

    x: gs.Tensor
    cos: gs.Tensor
    sin: gs.Tensor
    interleaved: int


@dataclass(frozen=True)
class _Tables:
    """Cosines and sines [positions, R / 2], and the tensor of positions [B, T] from which they are computed."""

    cos: gs.Constant
    sin: gs.Constant
    positions: gs.Tensor


def fuse_rotation(graph: gs.Graph, max_tokens: int | None) -> int:
    """Let each GroupQueryAttention rotate queries and keys itself (`do_rotary`), in place.

    Cosines and sines that depend only on the position become constants. The op reads the first position of a call and
    counts from there, so nothing is changed if the graph has other positions than those of a text and its past.

    Args:
        max_tokens: tokens of the longest allowed text, including its past. None: nothing is changed.

    Returns:
        the number of changed nodes.
    """
    if max_tokens is None:
        return 0
    tables_by_key: dict[Hashable, _Tables | None] = {}
    fused = 0
    for node in attentions(graph):
        if node.attrs.get("do_rotary") or any(tensor.name for tensor in node.inputs[_ROTARY]):
            continue
        q, k = (_rotated(tensor) for tensor in node.inputs[:2])
        if q is None or k is None or q.interleaved != k.interleaved:
            continue
        made_of = [_made_of(tensor) for tensor in (q.cos, q.sin, k.cos, k.sin)]
        if None in made_of or made_of[:2] != made_of[2:]:
            continue
        key = tuple(made_of[:2])
        if key not in tables_by_key:
            tables_by_key[key] = _tables(graph, q, max_tokens, f"settle/rotation.{len(tables_by_key)}")
        tables = tables_by_key[key]
        if tables is None:
            continue
        rows = node.inputs[2]
        name = f"settle/{node.outputs[0].name}"
        q_in = heads_joined(graph, q.x, node.inputs[0], f"{name}/q")
        k_in = heads_joined(graph, k.x, node.inputs[1], f"{name}/k")
        node.inputs = [q_in, k_in, rows, *node.inputs[3:7], tables.cos, tables.sin, tables.positions, *node.inputs[10:]]
        node.attrs |= {"do_rotary": 1, "rotary_interleaved": q.interleaved}
        fused += 1
    if fused:
        graph.cleanup(remove_unused_graph_inputs=False)
    return fused


def _rotated(tensor: gs.Tensor) -> _Rotated | None:
    """The rotation that computes `tensor` [B, T, heads · D], before Reshape and Transpose."""
    node = only_producer(tensor)
    heads = before_transpose(node.inputs[0]) if node is not None and node.op == "Reshape" else None
    rotation = only_producer(heads) if heads is not None else None
    if rotation is None or rotation.op != "RotaryEmbedding" or rotation.domain or len(rotation.inputs) != 3:
        return None
    x = before_transpose(rotation.inputs[0])
    if x is None or x.dtype != np.float32 or x.shape is None or not isinstance(x.shape[-1], int) or x.shape[-1] % _UNIT:
        return None
    return _Rotated(x, rotation.inputs[1], rotation.inputs[2], int(rotation.attrs.get("interleaved", 0)))


def _made_of(tensor: gs.Tensor) -> Hashable | None:
    """A key of how `tensor` is computed, equal for equal computations; None if it depends on more than positions."""
    if isinstance(tensor, gs.Constant):
        return id(tensor)
    if _is_positions(tensor):
        return "positions", id(tensor)
    node = only_producer(tensor)
    if node is None or node.domain or node.op not in _BY_POSITION:
        return None
    befores = tuple(_made_of(before) for before in node.inputs)
    return None if None in befores else (node.op, repr(sorted(node.attrs.items())), befores)


def _is_positions(tensor: gs.Tensor) -> bool:
    return tensor.dtype == np.int64 and tensor.shape is not None and len(tensor.shape) == 2


def _positions_of(tensor: gs.Tensor) -> list[gs.Tensor]:
    """The distinct tensors of positions from which `tensor` is computed."""
    if isinstance(tensor, gs.Constant):
        return []
    if _is_positions(tensor):
        return [tensor]
    node = only_producer(tensor)
    positions = [one for before in (node.inputs if node is not None else ()) for one in _positions_of(before)]
    return list({id(one): one for one in positions}.values())


def _tables(graph: gs.Graph, rotated: _Rotated, max_tokens: int, name: str) -> _Tables | None:
    """The angles of all positions; None if they depend on more than the position, or are too large."""
    position_tensors = {id(one): one for tensor in (rotated.cos, rotated.sin) for one in _positions_of(tensor)}
    half = rotated.cos.shape[-1] if rotated.cos.shape else None
    if (
        len(position_tensors) != 1
        or not isinstance(half, int)
        or half % (_UNIT // 2)
        or 4 * max_tokens * half > _MAX_BYTES
    ):
        return None
    (positions,) = position_tensors.values()
    if not _counts_tokens(graph, positions):
        return None
    forth = np.arange(max_tokens)
    angles, mirrored = (
        run_part(graph, [positions], [rotated.cos, rotated.sin], {positions.name: order[None]})
        for order in (forth, forth[::-1].copy())
    )
    for table, other in zip(angles, mirrored, strict=True):
        if table.shape != (1, max_tokens, half) or not np.array_equal(table[:, ::-1], other):
            return None
    cos, sin = (constant(f"{name}.{what}", table[0]) for what, table in zip(("cos", "sin"), angles, strict=True))
    return _Tables(cos, sin, positions)


def _counts_tokens(graph: gs.Graph, positions: gs.Tensor) -> bool:
    """Whether `positions` [B, T] of real tokens count 0, 1, ... in each row, and on from a past, when run."""
    nodes = list(nodes_between([], [positions]))
    read = {id(tensor) for node in nodes for tensor in node.inputs}
    inputs = [tensor for tensor in graph.inputs if id(tensor) in read]
    if not nodes or any(node.domain for node in nodes):
        return False
    for batch, past, tokens in _CALLS:
        mask = np.ones((batch, past + tokens), np.int64)
        mask[1:, -2:] = 0
        feeds = {}
        for tensor in inputs:
            if tensor.name == "attention_mask":
                feeds[tensor.name] = mask.astype(tensor.dtype)
            elif tensor.name == "input_ids":
                feeds[tensor.name] = np.full((batch, tokens), 3, tensor.dtype)
            elif tensor.name.startswith("past") and len(tensor.shape) == 4:
                shape = [batch, tensor.shape[1], past, tensor.shape[3]]
                feeds[tensor.name] = np.zeros([n if isinstance(n, int) else 1 for n in shape], tensor.dtype)
            else:
                return False
        (values,) = run_part(graph, [], [positions], feeds)
        real = mask[:, past:] == 1
        expected = np.broadcast_to(np.arange(past, past + tokens), (batch, tokens))
        if values.shape != (batch, tokens) or not np.array_equal(values[real], expected[real]):
            return False
    return True
