"""GatherBlocks on a GPU: a program copies some of the chosen activations of one token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from trimtab.plugins.dialect import Form
from trimtab.plugins.gather_blocks import GATHER_BLOCKS
from trimtab.plugins.gpu.kernel import GpuKernel, Shapes, Tile, ceil_div
from trimtab.plugins.gpu.products import rows_of, taken_of
from trimtab.plugins.sparse_up.gpu import measure

__all__ = ["KERNEL"]


@triton.jit
def gather_blocks(
    x, blocks,
    tokens, groups, k, neurons,
    y,
    BLOCK: tl.constexpr, AT_MOST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = k * BLOCK
    parts = tl.cdiv(rows, ROWS)
    token, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    group = token // (tokens // groups)
    row = part * ROWS + tl.arange(0, ROWS)
    there = row < rows
    number = rows_of(blocks, group, row, k, BLOCK)
    taken = taken_of(blocks, group, row, k, BLOCK, AT_MOST)
    value = tl.load(x + token * neurons + number, mask=taken & there, other=0.0)
    tl.store(y + token * rows + row, value, mask=there)


def _measure(shapes: Shapes) -> dict[str, Any]:
    return {**measure(shapes), "neurons": shapes["x"][-1]}


def _constants(form: Form, shapes: Shapes, tile: Tile) -> dict[str, Any]:
    return {
        "BLOCK": int(form.attributes["block"]),
        "AT_MOST": int(form.attributes["at_most"]),
        "ROWS": tile.rows,
    }


def _grid(sizes: Mapping[str, Any], constants: Mapping[str, Any], tile: Tile) -> tuple[Any, ...]:
    return sizes["tokens"] * ceil_div(sizes["k"] * constants["BLOCK"], tile.rows), 1, 1


def _tiles(form: Form, shapes: Shapes) -> tuple[Tile, ...]:
    return Tile(1, 1024, 1, 4), Tile(1, 512, 1, 4), Tile(1, 2048, 1, 8)


def _refuses(form: Form, shapes: Shapes) -> str | None:
    return None


KERNEL = GpuKernel(
    GATHER_BLOCKS, gather_blocks, ("tokens", "groups", "k", "neurons"), _measure, _constants, _grid, _tiles, _refuses
)
