"""What a graph demands of the values of its inputs, found by structure: indices of tables, masks that are summed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from trimtab.passes.graph.weights import values

_MICROSOFT = "com.microsoft"
_KEEPS = {"Identity", "Cast", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Transpose", "Expand", "Tile", "Concat"}
"""Ops whose output holds every element of their first input as it is; of Concat, of every input."""
_INTEGERS = {
    getattr(TensorProto, name) for name in ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")
}
_EMBED = {0: 2, 1: 4}  # com.microsoft EmbedLayerNormalization: ids → words, segments → segment table
_LENGTHS = {"GroupQueryAttention": 5, "Attention": 3, "MultiHeadAttention": 4}
"""com.microsoft attention → the input that may hold how many tokens of each row are real, counted from the first."""
_DEPTH = 24  # most nodes from an input to what reads it


@dataclass(frozen=True)
class Packed:
    """A mask [batch, past + tokens] of which attention sees the sum alone: each row's tokens have to come first.

    Attributes:
        mask: name of the graph's input.
        past: name of an input [batch, heads, past, width] with earlier keys, or None where attention has none.
    """

    mask: str
    past: str | None


def index_bounds(tensor: gs.Tensor) -> tuple[int, int] | None:
    """The least and the most value of an integer input whose elements are rows of constant tables; None of another.

    Elements may be cast, reshaped or moved by a constant on the way, as positions are that begin behind padding.
    """
    if not _is_integer(tensor):
        return None
    bounds = list(_bounds(tensor, 0, _DEPTH))
    if not bounds:
        return None
    return max(0, *(least for least, _ in bounds)), min(most for _, most in bounds)


def packed_mask(tensor: gs.Tensor) -> Packed | None:
    """What attention makes of an integer input that it takes as counts of tokens; None of another."""
    if not _is_integer(tensor):
        return None
    for node in _counting(tensor, False, _DEPTH):
        earlier = node.inputs[3] if node.op == "GroupQueryAttention" else None
        past = None if earlier is None else _source(earlier)
        if past is None or (isinstance(past, gs.Variable) and not past.inputs):
            return Packed(tensor.name, past.name if past is not None and past.name else None)
    return None


def _bounds(tensor: gs.Tensor, moved: int, depth: int) -> Iterator[tuple[int, int]]:
    """Bounds that the readers of `tensor` = input + `moved` set to the input."""
    if not depth:
        return
    for node in tensor.outputs:
        for rows in _tables(node, tensor):
            yield -moved, rows - 1 - moved
        offset = _offset(node, tensor)
        if offset is not None:
            yield from _bounds(node.outputs[0], moved + offset, depth - 1)


def _tables(node: gs.Node, indices: gs.Tensor) -> Iterator[int]:
    """Rows of each constant table that `node` looks `indices` up in."""
    tables: list[tuple[gs.Tensor, int]] = []
    if node.op == "Gather" and len(node.inputs) == 2 and node.inputs[1] is indices:
        tables.append((node.inputs[0], int(node.attrs.get("axis", 0))))
    elif node.op == "GatherBlockQuantized" and node.inputs[1] is indices:
        tables.append((node.inputs[0], int(node.attrs.get("gather_axis", 0))))
    elif node.op == "EmbedLayerNormalization" and node.domain == _MICROSOFT:
        places = [place for place in _EMBED if node.inputs[place] is indices]
        tables += [(node.inputs[_EMBED[place]], 0) for place in places]
    for table, axis in tables:
        shape = _constant_shape(table)
        if shape is not None and -len(shape) <= axis < len(shape):
            yield shape[axis]


def _constant_shape(table: gs.Tensor) -> tuple[int, ...] | None:
    """Shape of a constant, also of one that is stored in another type; else None."""
    for _ in range(4):
        if isinstance(table, gs.Constant):
            return tuple(int(size) for size in table.shape)
        if len(table.inputs) != 1 or table.inputs[0].op not in ("DequantizeLinear", "Cast", "Identity"):
            return None
        table = table.inputs[0].inputs[0]
    return None


def _offset(node: gs.Node, tensor: gs.Tensor) -> int | None:
    """What `node` adds to each element of `tensor` in its first output; None if it does anything else."""
    if node.op in ("Add", "Sub") and len(node.inputs) == 2:
        other = node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]
        if not isinstance(other, gs.Constant) or np.prod(other.shape, dtype=np.int64) != 1:
            return None
        by = int(values(other).reshape(-1)[0])
        if node.op == "Sub":
            return -by if node.inputs[0] is tensor else None
        return by
    if node.op not in _KEEPS or (node.op != "Concat" and node.inputs[0] is not tensor):
        return None
    return 0 if node.op != "Cast" or node.attrs.get("to") in _INTEGERS else None


def _counting(tensor: gs.Tensor, summed: bool, depth: int) -> Iterator[gs.Node]:
    """Attention nodes that take `tensor` as counts of tokens, if it was `summed` on the way."""
    if not depth:
        return
    for node in tensor.outputs:
        place = _LENGTHS.get(node.op) if node.domain == _MICROSOFT else None
        if summed and place is not None and len(node.inputs) > place and node.inputs[place] is tensor:
            yield node
        elif node.op == "EmbedLayerNormalization" and len(node.inputs) > 7 and node.inputs[7] is tensor:
            yield from _counting(node.outputs[1], True, depth - 1)
        elif node.op == "ReduceSum" and node.inputs[0] is tensor:
            yield from _counting(node.outputs[0], True, depth - 1)
        elif _offset(node, tensor) is not None:
            yield from _counting(node.outputs[0], summed, depth - 1)


def _source(tensor: gs.Tensor) -> gs.Tensor:
    """What `tensor` is made of by casts."""
    while len(tensor.inputs) == 1 and tensor.inputs[0].op in ("Cast", "Identity"):
        tensor = tensor.inputs[0].inputs[0]
    return tensor


def _is_integer(tensor: gs.Tensor) -> bool:
    return tensor.dtype is not None and np.dtype(tensor.dtype).kind in "iu"
