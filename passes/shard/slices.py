"""A rank's part of a constant, or of a tensor computed from constants; values on disk are not loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from trimtab.passes.graph import constant, values

Pieces: TypeAlias = tuple[tuple[int, int], ...]
"""Starts and sizes along an axis."""


class Whole(Exception):  # noqa: N818  (not an error: the message goes into the report)
    """Something cannot be divided, and stays whole on every rank; the message says why."""


@dataclass(frozen=True)
class Share:
    """Part `rank` of `shards` equal parts."""

    rank: int
    shards: int

    def of(self, size: int, what: str) -> slice:
        """The rank's share of `size` units, called `what`.

        Raises:
            Whole: `size` is not divisible by the number of shards.
        """
        if size % self.shards:
            raise Whole(f"{size} {what} are not divisible by {self.shards} shards")
        each = size // self.shards
        return slice(self.rank * each, (self.rank + 1) * each)


class Slices:
    """A rank's parts of constants, each created once, and names for new tensors and nodes."""

    def __init__(self, share: Share) -> None:
        self.share = share
        self._parts: dict[tuple[int, int, Pieces | None], gs.Constant] = {}
        self._names: dict[str, int] = {}

    def name(self, whole: str) -> str:
        """A new name for a part of the tensor or node `whole`."""
        count = self._names[whole] = self._names.get(whole, 0) + 1
        return f"{whole}/part" if count == 1 else f"{whole}/part.{count}"

    def constant(self, tensor: gs.Constant, axis: int, what: str, pieces: Pieces | None = None) -> gs.Constant:
        """The part of `tensor` along `axis`, a view: values on disk are read when the graph is saved.

        Args:
            pieces: ranges that are divided one by one; elements outside are dropped. Default: the whole axis.

        Raises:
            Whole: the size of a piece is not divisible.
        """
        axis %= len(tensor.shape)
        if (id(tensor), axis, pieces) not in self._parts:
            stored = tensor._values
            in_memory = type(stored) is LazyValues  # graphsurgeon would warn about types that numpy lacks
            array = onnx.numpy_helper.to_array(stored.tensor) if in_memory else values(tensor)
            taken = [
                slice(start + own.start, start + own.stop)
                for start, size in pieces or ((0, array.shape[axis]),)
                for own in [self.share.of(size, what)]
            ]
            parts = [array[(slice(None),) * axis + (one,)] for one in taken]
            part = parts[0] if len(parts) == 1 else np.concatenate(parts, axis)
            if part.dtype.isbuiltin == 1:
                own_part = gs.Constant(self.name(tensor.name), part)
            else:  # a type that numpy lacks
                proto = onnx.numpy_helper.from_array(np.ascontiguousarray(part))
                own_part = constant(self.name(tensor.name), proto)
            self._parts[id(tensor), axis, pieces] = own_part
        return self._parts[id(tensor), axis, pieces]

    def weight(
        self, tensor: gs.Tensor, axis: int, what: str, new_nodes: list[gs.Node], pieces: Pieces | None = None
    ) -> gs.Tensor:
        """The part along `axis` of a 2-D weight, perhaps behind Transpose, Cast and DequantizeLinear.

        Args:
            new_nodes: receives the nodes that compute the part.
            pieces: as in `constant`.

        Raises:
            Whole: the weight has another origin, or its blocks are not divisible.
        """
        if isinstance(tensor, gs.Constant):
            return self.constant(tensor, axis, what, pieces)
        node = tensor.inputs[0] if len(tensor.inputs) == 1 else None
        if node is not None and node.op == "Transpose" and node.attrs.get("perm", [1, 0]) == [1, 0]:
            inputs = [self.weight(node.inputs[0], 1 - axis, what, new_nodes, pieces)]
        elif node is not None and node.op == "Cast":
            inputs = [self.weight(node.inputs[0], axis, what, new_nodes, pieces)]
        elif node is not None and node.op == "DequantizeLinear" and pieces is None:
            inputs = self._quantized(node, axis, what)
        else:
            raise Whole(f"its weight comes from {node.op if node else 'outside'}, not from a constant")
        y = gs.Variable(self.name(tensor.name), tensor.dtype)
        new_nodes.append(gs.Node(node.op, self.name(node.name or node.op), dict(node.attrs), inputs, [y], node.domain))
        return y

    def _quantized(self, node: gs.Node, axis: int, what: str) -> list[gs.Tensor]:
        """The rank's part of a DequantizeLinear's integers, scales and zero points, along `axis` of the integers."""
        q, *others = node.inputs
        if not all(isinstance(tensor, gs.Constant) for tensor in node.inputs if tensor.name):
            raise Whole("its quantized weight is not a constant")
        along = int(node.attrs.get("axis", 1)) % len(q.shape)
        block = int(node.attrs.get("block_size", 0))
        part = self.share.of(int(q.shape[axis]), what)
        if block and axis == along and (part.stop - part.start) % block:
            raise Whole(f"{part.stop - part.start} {what} of a shard are not whole blocks of {block}")
        parts: list[gs.Tensor] = [self.constant(q, axis, what)]
        for tensor in others:
            if tensor.name and block and len(tensor.shape) == len(q.shape):
                parts.append(self.constant(tensor, axis, "blocks"))
            elif tensor.name and int(np.prod(tensor.shape)) > 1 and axis == along:
                parts.append(self.constant(tensor, 0, what))
            else:
                parts.append(tensor)  # one for the whole tensor, or along the other axis
        return parts
