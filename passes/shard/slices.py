"""A rank's part of a constant, or of what a graph makes of constants alone; on disk as long as it lies there."""

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


class Whole(Exception):  # noqa: N818  (no error: what it says goes into the report)
    """Something cannot be divided, and stays whole on every rank; the message says why."""


@dataclass(frozen=True)
class Share:
    """Part `rank` of `shards` equal ones."""

    rank: int
    shards: int

    def of(self, size: int, what: str) -> slice:
        """The share of `size` things, called `what`.

        Raises:
            Whole: they do not divide.
        """
        if size % self.shards:
            raise Whole(f"{size} {what} are not divisible by {self.shards} shards")
        each = size // self.shards
        return slice(self.rank * each, (self.rank + 1) * each)


class Slices:
    """A rank's parts of constants, each made once, and names for what is new."""

    def __init__(self, share: Share) -> None:
        self.share = share
        self._known: dict[tuple[int, int, Pieces | None], gs.Constant] = {}
        self._names: dict[str, int] = {}

    def name(self, whole: str) -> str:
        """For the part of what is called `whole`; never the same twice."""
        count = self._names[whole] = self._names.get(whole, 0) + 1
        return f"{whole}/part" if count == 1 else f"{whole}/part.{count}"

    def constant(self, tensor: gs.Constant, axis: int, what: str, pieces: Pieces | None = None) -> gs.Constant:
        """The part of `tensor` along `axis`, a view: what lies on disk is read when it is written.

        Args:
            pieces: each is divided on its own, and what lies outside is left out; by default all is one.

        Raises:
            Whole: its size, of so many `what`, does not divide.
        """
        axis %= len(tensor.shape)
        if (id(tensor), axis, pieces) not in self._known:
            held = tensor._values
            known = type(held) is LazyValues  # in memory: graphsurgeon would warn of types that numpy lacks
            array = onnx.numpy_helper.to_array(held.tensor) if known else values(tensor)
            taken = [
                slice(start + own.start, start + own.stop)
                for start, size in pieces or ((0, array.shape[axis]),)
                for own in [self.share.of(size, what)]
            ]
            parts = [array[(slice(None),) * axis + (one,)] for one in taken]
            part = parts[0] if len(parts) == 1 else np.concatenate(parts, axis)
            if part.dtype.isbuiltin == 1:
                found = gs.Constant(self.name(tensor.name), part)
            else:  # a type that numpy lacks
                proto = onnx.numpy_helper.from_array(np.ascontiguousarray(part))
                found = constant(self.name(tensor.name), proto)
            self._known[id(tensor), axis, pieces] = found
        return self._known[id(tensor), axis, pieces]

    def weight(
        self, tensor: gs.Tensor, axis: int, what: str, made: list[gs.Node], pieces: Pieces | None = None
    ) -> gs.Tensor:
        """The part along `axis` of a 2-D weight, which may stand behind Transpose, Cast and DequantizeLinear.

        Args:
            made: gets the nodes that compute it.
            pieces: as of `constant`.

        Raises:
            Whole: it comes from something else, or its blocks do not divide.
        """
        if isinstance(tensor, gs.Constant):
            return self.constant(tensor, axis, what, pieces)
        node = tensor.inputs[0] if len(tensor.inputs) == 1 else None
        if node is not None and node.op == "Transpose" and node.attrs.get("perm", [1, 0]) == [1, 0]:
            inputs = [self.weight(node.inputs[0], 1 - axis, what, made, pieces)]
        elif node is not None and node.op == "Cast":
            inputs = [self.weight(node.inputs[0], axis, what, made, pieces)]
        elif node is not None and node.op == "DequantizeLinear" and pieces is None:
            inputs = self._quantized(node, axis, what)
        else:
            raise Whole(f"its weight comes from {node.op if node else 'outside'}, not from a constant")
        y = gs.Variable(self.name(tensor.name), tensor.dtype)
        made.append(gs.Node(node.op, self.name(node.name or node.op), dict(node.attrs), inputs, [y], node.domain))
        return y

    def _quantized(self, node: gs.Node, axis: int, what: str) -> list[gs.Tensor]:
        """The inputs of a DequantizeLinear: integers, scales and zero points, along `axis` of the integers."""
        q, *others = node.inputs
        if not all(isinstance(tensor, gs.Constant) for tensor in node.inputs if tensor.name):
            raise Whole("its quantized weight is no constant")
        along = int(node.attrs.get("axis", 1)) % len(q.shape)
        block = int(node.attrs.get("block_size", 0))
        part = self.share.of(int(q.shape[axis]), what)
        if block and axis == along and (part.stop - part.start) % block:
            raise Whole(f"{part.stop - part.start} {what} of a shard are no whole blocks of {block}")
        found: list[gs.Tensor] = [self.constant(q, axis, what)]
        for tensor in others:
            if tensor.name and block and len(tensor.shape) == len(q.shape):
                found.append(self.constant(tensor, axis, "blocks"))
            elif tensor.name and int(np.prod(tensor.shape)) > 1 and axis == along:
                found.append(self.constant(tensor, 0, what))
            else:
                found.append(tensor)  # one for the whole tensor, or along the other axis
        return found
