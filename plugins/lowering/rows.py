"""Chosen rows of weights in standard ops: gathered, and multiplied with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.plugins.lowering.nodes import Nodes, type_of

_INT4_BLOCK = 32


@dataclass(frozen=True)
class Rows:
    """Which rows of a weight are multiplied with.

    Attributes:
        numbers: [tokens or 1, n] int32, or the same as an array where it is known before the model runs.
        taken: where there is a row, [tokens or 1, 1, n] bool; None where all are.
    """

    numbers: gs.Tensor | np.ndarray
    taken: gs.Tensor | None = None

    @classmethod
    def of(cls, nodes: Nodes, blocks: gs.Tensor, block: int, at_most: bool = False) -> Rows:
        """Of the blocks [tokens or 1, k], `block` rows in each. `at_most`: some may be -1, which are none."""
        within = np.arange(block, dtype=np.int32)
        if at_most:
            first = np.array(0, np.int32)
            there = nodes("Unsqueeze", nodes("GreaterOrEqual", blocks, first, dtype=bool), [2])
            taken = nodes("Reshape", nodes("And", there, within >= 0, dtype=bool), [0, 1, -1])
            return cls(cls.of(nodes, nodes("Max", blocks, first), block).numbers, taken)
        if isinstance(blocks, gs.Constant):
            numbers = nodes.values(blocks).astype(np.int32)
            return cls((numbers[..., None] * np.int32(block) + within).reshape(len(numbers), -1))
        if block == 1:
            return cls(blocks)
        starts = nodes("Unsqueeze", nodes("Mul", blocks, np.array(block, np.int32)), [2])
        return cls(nodes("Reshape", nodes("Add", starts, within), [0, -1]))

    def only_taken(self, nodes: Nodes, h: gs.Tensor) -> gs.Tensor:
        """h [tokens, 1, n], with 0 where there is no row."""
        if self.taken is None:
            return h
        return nodes("Where", self.taken, h, np.array(0, type_of(h)), dtype=type_of(h))

    def of_all(self, count: int) -> bool:
        """Whether these are all rows, in order, for all tokens."""
        return isinstance(self.numbers, np.ndarray) and np.array_equal(self.numbers, np.arange(count)[None])

    def gather(self, nodes: Nodes, weight: np.ndarray | gs.Tensor) -> gs.Tensor:
        """[tokens or 1, n, ...] of `weight` [rows, ...]; where they are known, without a gather.

        A constant of the graph is not read, unless some of its rows are known to be all that is used.
        """
        if isinstance(self.numbers, np.ndarray):
            if self.of_all(int(weight.shape[0])):
                return nodes("Unsqueeze", nodes.tensor(weight), [0])
            array = nodes.values(weight) if isinstance(weight, gs.Constant) else weight
            return nodes.tensor(np.asarray(array)[self.numbers])
        return nodes("Gather", nodes.tensor(weight), self.numbers, axis=0)


@dataclass(frozen=True)
class Weight:
    """Chosen rows of one weight, in the type it is multiplied in.

    Attributes:
        rows: [tokens or 1, n, width].
        scale: what each row still has to be multiplied with, [tokens or 1, 1, n].
    """

    rows: gs.Tensor
    scale: gs.Tensor | None

    @classmethod
    def of(cls, nodes: Nodes, chosen: Rows, inputs: Mapping[str, gs.Tensor], label: str, x: gs.Tensor) -> Weight:
        """Of the weight `label`, to multiply `x` with: in half precision where the weight or `x` is of it."""
        if type_of(inputs[label]) not in (np.uint8, np.int8):
            return cls(chosen.gather(nodes, inputs[label]), None)
        array = nodes.values(inputs[label])
        dtype, scale = type_of(x), nodes.values(inputs[f"{label}_scale"])
        scale = scale.astype(dtype)
        if array.dtype == np.uint8:
            return cls(_int4(nodes, chosen, array, scale), None)
        if isinstance(chosen.numbers, np.ndarray) and len(chosen.numbers) == 1:
            known = array[chosen.numbers[0]], scale[chosen.numbers[0]]
            rows = nodes("DequantizeLinear", *known, dtype=dtype, axis=0)
            return cls(nodes("Unsqueeze", rows, [0]), None)
        # TensorRT gathers no int8 outside of a quantized region, but uint8.
        moved = nodes.cast(chosen.gather(nodes, (array.astype(np.int16) + 128).astype(np.uint8)), dtype)
        rows = nodes("Sub", moved, np.array(128, dtype))
        return cls(rows, nodes("Unsqueeze", chosen.gather(nodes, scale), [1]))

    @property
    def dtype(self) -> np.dtype:
        return type_of(self.rows)


def _int4(nodes: Nodes, chosen: Rows, packed: np.ndarray, scale: np.ndarray) -> gs.Tensor:
    """Two to a byte, the first in the low half, zero at 8; a scale for each 32 of a row."""
    dtype = scale.dtype
    both = nodes.cast(chosen.gather(nodes, packed), dtype)
    high = nodes("Floor", nodes("Mul", both, np.array(1 / 16, dtype)))
    low = nodes("Sub", both, nodes("Mul", high, np.array(16, dtype)))
    pairs = nodes("Concat", nodes("Unsqueeze", low, [3]), nodes("Unsqueeze", high, [3]), axis=3)
    centred = nodes("Sub", nodes("Reshape", pairs, [0, 0, -1, _INT4_BLOCK]), np.array(8, dtype))
    spread = nodes("Unsqueeze", chosen.gather(nodes, scale), [3])
    return nodes("Reshape", nodes("Mul", centred, spread), [0, 0, -1])


def product(nodes: Nodes, x: gs.Tensor, inputs: Mapping[str, gs.Tensor], label: str, chosen: Rows) -> gs.Variable:
    """x [..., width] with the chosen rows of `label`, [tokens, 1, n]."""
    weight = Weight.of(nodes, chosen, inputs, label, x)
    flat = nodes("Reshape", x, nodes("Concat", [-1, 1], nodes.size(x, -1), axis=0), dtype=type_of(x))
    y = nodes("MatMul", nodes.cast(flat, weight.dtype), nodes("Transpose", weight.rows, perm=[0, 2, 1]))
    if weight.scale is not None:
        y = nodes("Mul", y, weight.scale)
    if f"{label}_bias" in inputs:
        bias = nodes.values(inputs[f"{label}_bias"]).astype(weight.dtype)
        y = nodes("Add", y, nodes("Unsqueeze", chosen.gather(nodes, bias), [1]))
    return y


def like(nodes: Nodes, flat: gs.Tensor, x: gs.Tensor) -> gs.Variable:
    """[tokens, 1, n] in the leading axes of x."""
    return nodes("Reshape", flat, nodes("Concat", nodes("Shape", x, end=-1), nodes("Shape", flat, start=-1), axis=0))
