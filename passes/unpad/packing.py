"""The nodes that pack the tokens of a batch, and those that unpack them to their positions."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.graph import constant, insert
from trimtab.passes.graph.segments import segment_mean

__all__ = ["Packing"]

_NAME = "unpad"
_BOOL, _INT32 = 9, 6  # ONNX's numbers of types
_END = np.iinfo(np.int64).max


class Packing:
    """Packs the real tokens of a batch, which the graph's mask marks; without a mask, all tokens.

    Each node is created once, at its first use. All nodes also work for a batch without samples.

    Attributes:
        offsets: [batch + 1], int32: sample b has the rows offsets[b] to offsets[b + 1] of a packed tensor.
    """

    def __init__(self, graph: gs.Graph, stream: gs.Tensor, mask: gs.Tensor | None) -> None:
        self._graph = graph
        self._made: dict[str, gs.Tensor] = {}
        shaped = stream if mask is None else mask
        self._batch = self._node("Shape", [shaped], "batch", np.int64, start=0, end=1)
        self._tokens = self._node("Shape", [shaped], "tokens", np.int64, start=1, end=2)
        self._places = self._node("Mul", [self._batch, self._tokens], "places", np.int64)
        one, zero = self._constant("one", 1, np.int64), self._constant("zero", 0, np.int64)
        samples = self._node("Squeeze", [self._batch, self._constant("axis", [0], np.int64)], "samples", np.int64)
        stop = self._node("Add", [samples, one], "stop", np.int64)
        numbers = self._node("Range", [zero, stop, one], "numbers", np.int64)
        places = self._node("Mul", [numbers, self._tokens], "first_places", np.int64)  # and one past the last sample
        if mask is None:
            self._real: gs.Tensor | None = None
            self.offsets = self._node("Cast", [places], "offsets", np.int32, to=_INT32)
        else:
            flat = self._node("Reshape", [mask, self._places], "flat_mask", mask.dtype, allowzero=1)
            self._real = self._node("Cast", [flat], "real", bool, to=_BOOL)
            ones = self._node("Cast", [self._real], "ones", np.int32, to=_INT32)
            self._counted = self._node("CumSum", [ones, self._constant("first_axis", 0, np.int64)], "counted", np.int32)
            none = self._constant("none", [0], np.int32)
            before = self._node("Concat", [none, self._counted], "before", np.int32, axis=0)
            self.offsets = self._node("Gather", [before, places], "offsets", np.int32, axis=0)
        self.offsets.shape = [f"{_NAME}.ends"]

    def pack(self, tensor: gs.Tensor) -> gs.Tensor:
        """[batch, tokens, ...] → [real tokens, ...]."""
        tail = self._node("Shape", [tensor], f"{tensor.name}/tail", np.int64, start=2)
        size = self._node("Concat", [self._places, tail], f"{tensor.name}/flat_size", np.int64, axis=0)
        packed = self._node("Reshape", [tensor, size], f"{tensor.name}/flat", tensor.dtype, allowzero=1)
        if self._real is not None:
            indices = self._node("NonZero", [self._real], "found", np.int64)
            rows = self._node("Squeeze", [indices, self._constant("axis", [0], np.int64)], "rows", np.int64)
            packed = self._node("Gather", [packed, rows], f"{tensor.name}/packed", tensor.dtype, axis=0)
        packed.shape = None if tensor.shape is None else [f"{_NAME}.real", *tensor.shape[2:]]
        return packed

    def unpack(self, packed: gs.Tensor) -> gs.Tensor:
        """[real tokens, ...] → [batch, tokens, ...], zeros for padding."""
        tail = self._tail(packed)
        size = self._node("Concat", [self._batch, self._tokens, tail], f"{packed.name}/size", np.int64, axis=0)
        flat = packed
        if self._real is not None:
            one = self._constant("one32", 1, np.int32)
            place = self._node("Sub", [self._counted, one], "row_before", np.int32)
            rows = self._node("Where", [self._real, place, self._count()], "row_of_place", np.int32)
            whole = self._with_zeros(packed)
            flat = self._node("Gather", [whole, rows], f"{packed.name}/placed", packed.dtype, axis=0)
        return self._node("Reshape", [flat, size], f"{packed.name}/padded", packed.dtype, allowzero=1)

    def first(self, packed: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor]:
        """A tensor, and its rows [batch] with each sample's first real token; zeros for a sample without any."""
        start, last = self._constant("start", [0], np.int64), self._constant("last", [-1], np.int64)
        starts = self._node("Slice", [self.offsets, start, last], "starts", np.int32)
        if self._real is None:
            return packed, starts
        second, end = self._constant("second", [1], np.int64), self._constant("end", [_END], np.int64)
        stops = self._node("Slice", [self.offsets, second, end], "stops", np.int32)
        empty = self._node("Equal", [starts, stops], "empty", bool)
        rows = self._node("Where", [empty, self._count(), starts], "first_rows", np.int32)
        return self._with_zeros(packed), rows

    def pooled(self, packed: gs.Tensor, kind: Literal["mean", "first"]) -> gs.Tensor:
        """[real tokens, d] → [batch, d]: the mean of each sample's real tokens, or the first of them."""
        name = f"{_NAME}/{packed.name}/{kind}"
        if name not in self._made:
            if kind == "first":
                return self._node("Gather", list(self.first(packed)), f"{packed.name}/first", packed.dtype, axis=0)
            self._made[name] = segment_mean(self._graph, packed, self.offsets, name)
        return self._made[name]

    def _count(self) -> gs.Tensor:
        """The number of real tokens, [1], which is also the index of the row of zeros behind them."""
        return self._node("Slice", [self.offsets, self._constant("last", [-1], np.int64),
                                    self._constant("end", [_END], np.int64)], "count", np.int32)  # fmt: skip

    def _with_zeros(self, packed: gs.Tensor) -> gs.Tensor:
        """`packed` with a row of zeros at the end."""
        one = self._constant("second", [1], np.int64)
        size = self._node("Concat", [one, self._tail(packed)], f"{packed.name}/row", np.int64, axis=0)
        zeros = self._node("ConstantOfShape", [size], f"{packed.name}/zeros", packed.dtype)
        return self._node("Concat", [packed, zeros], f"{packed.name}/with_zeros", packed.dtype, axis=0)

    def _tail(self, packed: gs.Tensor) -> gs.Tensor:
        return self._node("Shape", [packed], f"{packed.name}/tail", np.int64, start=1)

    def _node(self, op: str, inputs: list[gs.Tensor], name: str, dtype: object, **attrs: object) -> gs.Tensor:
        full = f"{_NAME}/{name}"
        if full not in self._made:
            self._made[full] = insert(self._graph, op, inputs, full, attrs=attrs, dtype=dtype)
        return self._made[full]

    def _constant(self, name: str, value: int | list[int], dtype: type[np.integer]) -> gs.Tensor:
        full = f"{_NAME}/{name}"
        if full not in self._made:
            self._made[full] = constant(full, np.array(value, dtype))
        return self._made[full]
