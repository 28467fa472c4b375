"""SparseDown on a GPU: a program has a few columns of the output, and reads them of every chosen row.

Outputs of a plugin are not zeroed, so rows cannot be divided among programs that add up; the warps of one program
divide them instead. `down` lies row by row as everywhere: neighbouring programs read the same rows at about the same
time, so that memory is read in long pieces although each program takes 32 or 64 bytes of a row. A layout in tiles of
columns was no faster (H200: 17.1 and 17.6 us for half of 11008 rows), nor were more rows ahead or other cache policies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from trimtab.plugins.dialect import Form
from trimtab.plugins.gpu.kernel import GpuKernel, Shapes, Tile, of_tile, token_programs
from trimtab.plugins.gpu.products import place, rows_of, taken_of, tile_of, wide
from trimtab.plugins.sparse_down import SPARSE_DOWN
from trimtab.plugins.sparse_up.gpu import measure, refuses_weights

__all__ = ["KERNEL"]


@triton.jit
def activations(h, row, rows, number, taken, down_scale, first, token, own, TOKENS: tl.constexpr):
    """Those at the places `row`, [rows] of one token or [tokens, rows], times the scales of their rows of weights."""
    there = taken & (row < rows)
    if TOKENS == 1:
        part = tl.load(h + first * rows + row, mask=there, other=0.0).to(tl.float32)
        if down_scale is not None:
            part *= tl.load(down_scale + number).to(tl.float32)
    else:
        at = (first + token)[:, None] * rows + row[None, :]
        part = tl.load(h + at, mask=(token < own)[:, None] & there[None, :], other=0.0)
        if down_scale is not None:  # in half precision, small scales would vanish
            part = part.to(tl.float32) * tl.load(down_scale + number).to(tl.float32)[None, :]
    return part


@triton.jit
def add_rows(total, part, w, EXACT: tl.constexpr):
    """`total` + activations times rows of weights. EXACT: where tf32 would lose bits."""
    if len(part.shape) == 1:  # of the rows that lie in one thread, a sum is enough
        FOLDED: tl.constexpr = w.shape[0] // total.shape[0]
        products = tl.reshape(wide(w) * part[:, None], [FOLDED, total.shape[0], w.shape[1]])
        total += tl.sum(products, 0)
    elif EXACT:
        total = tl.dot(part, wide(w), total, input_precision="ieee")
    else:
        total = tl.dot(part, w.to(part.dtype), total, input_precision="tf32")
    return total


@triton.jit
def sparse_down(
    h, blocks, down, down_scale,
    tokens, groups, k,
    y,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, AT_MOST: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    group, first, own, slice_ = place(tokens, groups, TOKENS)
    token = tl.arange(0, TOKENS)
    column = slice_ * COLUMNS + tl.arange(0, COLUMNS)
    rows = k * BLOCK
    if TOKENS == 1:
        total = tl.zeros([LANES, COLUMNS], tl.float32)
    else:
        total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    row = tl.arange(0, ROWS)
    EXACT: tl.constexpr = h.dtype.element_ty == tl.float32
    if STAGES > 1:  # the compiler keeps weights ahead, in shared memory
        for start in tl.range(0, rows, ROWS, num_stages=STAGES):
            number = rows_of(blocks, group, start + row, k, BLOCK)
            taken = taken_of(blocks, group, start + row, k, BLOCK, AT_MOST)
            w = tile_of(down, number, taken, column, WIDTH, COLUMNS, AT_MOST)
            part = activations(h, start + row, rows, number, taken, down_scale, first, token, own, TOKENS)
            total = add_rows(total, part, w, EXACT)
    else:  # what the next turn needs is on its way, in registers, while this one multiplies
        number = rows_of(blocks, group, row, k, BLOCK)
        taken = taken_of(blocks, group, row, k, BLOCK, AT_MOST)
        w = tile_of(down, number, taken, column, WIDTH, COLUMNS, AT_MOST)
        part = activations(h, row, rows, number, taken, down_scale, first, token, own, TOKENS)
        number = rows_of(blocks, group, ROWS + row, k, BLOCK)
        taken = taken_of(blocks, group, ROWS + row, k, BLOCK, AT_MOST)
        for start in range(ROWS, rows + ROWS, ROWS):
            next_w = tile_of(down, number, taken, column, WIDTH, COLUMNS, AT_MOST)
            next_part = activations(h, start + row, rows, number, taken, down_scale, first, token, own, TOKENS)
            number = rows_of(blocks, group, start + ROWS + row, k, BLOCK)
            taken = taken_of(blocks, group, start + ROWS + row, k, BLOCK, AT_MOST)
            total = add_rows(total, part, w, EXACT)
            w, part = next_w, next_part
    if TOKENS == 1:
        total = tl.sum(total, 0)[None, :]
    to = (first + token)[:, None] * WIDTH + column[None, :]
    tl.store(y + to, total.to(y.dtype.element_ty), mask=(token < own)[:, None] & (column < WIDTH)[None, :])


def _size(form: Form) -> int:
    """Bytes of a weight."""
    return {"tensor(float)": 4, "tensor(int8)": 1}.get(form.given["down"], 2)


def _tiles(form: Form, shapes: Shapes) -> tuple[Tile, ...]:
    more = max(1, _size(form) // 2)  # float32 fills registers twice
    one = (1024, 32, 16), (512, 32, 8), (512, 16, 8), (1024, 16, 8), (256, 32, 8)
    if form.given["h"] == "tensor(float)":  # no matrix units: sums and both factors lie in registers
        many = [Tile(32, 32, 32, 4, 2), Tile(64, 32, 32, 8, 2)]
    else:
        many = [Tile(16, 128, 32, 8), Tile(16, 256, 32, 4), Tile(64, 64, 32, 4, 2)]
    return (*(Tile(1, rows // more, columns, warps) for rows, columns, warps in one), *many)


def _constants(form: Form, shapes: Shapes, tile: Tile) -> dict[str, Any]:
    at_once = 16 // _size(form)  # elements that a thread loads
    return {
        "WIDTH": int(shapes["down"][1]),
        "BLOCK": int(form.attributes["block"]),
        "AT_MOST": int(form.attributes["at_most"]),
        **of_tile(tile),
        "LANES": min(tile.rows, max(1, 32 * tile.warps * at_once // tile.columns)),
    }


def _grid(sizes: Mapping[str, Any], constants: Mapping[str, Any], tile: Tile) -> tuple[Any, ...]:
    return token_programs(sizes, tile.tokens) * -(-constants["WIDTH"] // tile.columns), 1, 1


KERNEL = GpuKernel(
    SPARSE_DOWN, sparse_down, ("tokens", "groups", "k"), measure, _constants, _grid, _tiles, refuses_weights
)
