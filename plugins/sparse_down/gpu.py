"""SparseDown on a GPU: a program has a few columns of the output, and reads them of every chosen row.

Outputs of a plugin are not zeroed, so rows cannot be divided among programs that add up; the warps of one program divide
them instead. `down` lies row by row as everywhere: neighbouring programs read the same rows at about the same time, so
that pages of memory are read whole although each program takes 64 bytes of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from trimtab.plugins.dialect import Form
from trimtab.plugins.gpu.kernel import GpuKernel, Shapes, Tile, ceil_div, token_programs
from trimtab.plugins.gpu.products import place, rows_of
from trimtab.plugins.sparse_down import SPARSE_DOWN
from trimtab.plugins.sparse_up.gpu import measure, refuses_weights

__all__ = ["KERNEL"]


@triton.jit
def sparse_down(
    h, blocks, down, down_scale,
    tokens, groups, k,
    y,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    group, first, own = place(tokens, groups, TOKENS)
    token = tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    have = column < WIDTH
    rows = k * BLOCK
    if TOKENS == 1:
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
    else:
        total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for start in tl.range(0, rows, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        number = rows_of(blocks, group, row, k, BLOCK)
        from_ = down + number[:, None] * WIDTH + column[None, :]
        if WIDTH % COLUMNS == 0:
            w = tl.load(from_)
        else:
            w = tl.load(from_, mask=have[None, :], other=0)
        at = (first + token).to(tl.int64)[:, None] * rows + row[None, :]
        part = tl.load(h + at, mask=(token < own)[:, None] & (row < rows)[None, :], other=0.0)
        if down_scale is not None:  # in half precision, small scales would vanish
            part = part.to(tl.float32) * tl.load(down_scale + number).to(tl.float32)[None, :]
        if TOKENS == 1:
            total += w.to(tl.float32) * tl.reshape(part.to(tl.float32), [ROWS, 1])
        elif h.dtype.element_ty == tl.float32:
            total = tl.dot(part, w.to(tl.float32), total, input_precision="ieee")
        else:  # of float16, bfloat16 and int8, tf32 loses nothing
            total = tl.dot(part, w.to(part.dtype), total, input_precision="tf32")
    if TOKENS == 1:
        total = tl.sum(total, 0)[None, :]
    to = (first + token).to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(y + to, total.to(y.dtype.element_ty), mask=(token < own)[:, None] & have[None, :])


def _tiles(form: Form, shapes: Shapes) -> tuple[Tile, ...]:
    one = [Tile(1, 512, 32, 16), Tile(1, 256, 32, 8), Tile(1, 256, 16, 8), Tile(1, 128, 64, 8)]
    return (*one, Tile(16, 64, 32, 4, 4), Tile(16, 128, 32, 4, 4), Tile(64, 64, 64, 4, 4))


def _constants(form: Form, shapes: Shapes, tile: Tile) -> dict[str, Any]:
    return {
        "WIDTH": int(shapes["down"][1]),
        "BLOCK": int(form.attributes["block"]),
        "TOKENS": tile.tokens,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "STAGES": tile.stages,
    }


def _grid(sizes: Mapping[str, Any], constants: Mapping[str, Any], tile: Tile) -> tuple[Any, ...]:
    return token_programs(sizes, tile.tokens), -(-constants["WIDTH"] // tile.columns), 1


KERNEL = GpuKernel(
    SPARSE_DOWN, sparse_down, ("tokens", "groups", "k"), measure, _constants, _grid, _tiles, refuses_weights
)
