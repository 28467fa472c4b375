"""The GPU kernel of an op: the function, its tiles, and its run-time sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.plugins.dialect import Form, Op

Shapes = Mapping[str, Sequence[Any]]
"""Input or output → its shape. Sizes are integers, or expressions that know + * // with an integer on their right."""


@dataclass(frozen=True)
class Tile:
    """How a launch divides its work: one of the tactics that a builder may time.

    Attributes:
        tokens: tokens of one program. 1 multiplies row by row; 16 and more use the matrix units.
        rows: neurons (or scores) that a program reads at a time.
        columns: elements of each of those rows that it reads at a time.
        warps: of a program.
        stages: loads in flight ahead of their use, where the compiler can keep them so.
    """

    tokens: int
    rows: int
    columns: int
    warps: int
    stages: int = 1


@dataclass(frozen=True)
class GpuKernel:
    """The kernel of one op.

    The run-time parameters of `function` are pointers to all inputs of the op in their order (None where a form leaves
    one out), then `sizes` as 32-bit integers, then pointers to the outputs (None likewise), then those to the 32-bit
    integers of `counted`: the order in which TensorRT gives them. Everything behind is known at compile time.

    Attributes:
        sizes: names of the integers.
        measure: their values, from the shapes of all inputs and outputs.
        constants: values of what is known at compile time, from the form, the sizes of its constant inputs, and a tile.
        grid: programs along each axis, from the values of `sizes`, the constants, and a tile.
        tiles: those worth timing, for a form and the shapes of its constant inputs; the first, where none is timed.
        refuses: why there is no kernel for a form and shapes, or None.
        counted: names of the sizes that hang on data, which it writes beside the outputs that have them. An output that
            is not optional has each.
    """

    op: Op
    function: Any
    sizes: tuple[str, ...]
    measure: Callable[[Shapes], dict[str, Any]] = field(repr=False)
    constants: Callable[[Form, Shapes, Tile], dict[str, Any]] = field(repr=False)
    grid: Callable[[Mapping[str, Any], Mapping[str, Any], Tile], tuple[Any, ...]] = field(repr=False)
    tiles: Callable[[Form, Shapes], tuple[Tile, ...]] = field(repr=False)
    refuses: Callable[[Form, Shapes], str | None] = field(repr=False)
    counted: tuple[str, ...] = ()


def of_tile(tile: Tile) -> dict[str, Any]:
    """What kernels with weights know of their tile at compile time."""
    return {"TOKENS": tile.tokens, "ROWS": tile.rows, "COLUMNS": tile.columns, "STAGES": tile.stages}


def product(sizes: Sequence[Any]) -> Any:
    """Of sizes that may be expressions."""
    total: Any = None
    for size in sizes:
        total = size if total is None else total * size
    return 1 if total is None else total


def ceil_div(a: Any, b: int) -> Any:
    """⌈a / b⌉ of a size that may be an expression."""
    return a if b == 1 else (a + (b - 1)) // b


def token_programs(sizes: Mapping[str, Any], tokens: int) -> Any:
    """Programs along the tokens: each has at most `tokens` of one group, the tokens that share a choice of blocks."""
    groups = sizes["groups"]
    return groups * ceil_div(sizes["tokens"] // groups, tokens)


def power_of_two(n: int) -> int:
    """The smallest that is not less than `n`."""
    return 1 << max(0, n - 1).bit_length()
