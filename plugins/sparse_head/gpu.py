"""SparseHead on a GPU: as SparseUp, with one matrix and nothing behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from trimtab.plugins.dialect import Form
from trimtab.plugins.gpu.kernel import GpuKernel, Shapes, Tile, ceil_div, of_tile, token_programs
from trimtab.plugins.gpu.products import place, rows_of, taken_of, tile_of, tile_of_tokens, times_rows
from trimtab.plugins.sparse_head import SPARSE_HEAD
from trimtab.plugins.sparse_up.gpu import measure, refuses_weights, tiles

__all__ = ["KERNEL"]


@triton.jit
def sparse_head(
    x, blocks, weight, weight_scale, weight_bias,
    tokens, groups, k,
    logits,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    group, first, own, part = place(tokens, groups, TOKENS)
    row = part * ROWS + tl.arange(0, ROWS)
    number = rows_of(blocks, group, row, k, 1)
    taken = taken_of(blocks, group, row, k, 1, 0)
    token = tl.arange(0, TOKENS)
    if TOKENS == 1:
        y = tl.zeros([ROWS, COLUMNS], tl.float32)
    else:
        y = tl.zeros([TOKENS, ROWS], tl.float32)
    for start in tl.range(0, WIDTH, COLUMNS, num_stages=STAGES):
        column = start + tl.arange(0, COLUMNS)
        tile = tile_of_tokens(x, first, token, own, column, WIDTH, TOKENS)
        y = times_rows(tile, tile_of(weight, number, taken, column, WIDTH, COLUMNS, 0), y)
    if TOKENS == 1:
        y = tl.sum(y, 1)[None, :]
    if weight_scale is not None:
        y *= tl.load(weight_scale + number).to(tl.float32)[None, :]
    if weight_bias is not None:
        y += tl.load(weight_bias + number).to(tl.float32)[None, :]
    to = (first + token)[:, None] * k + row[None, :]
    tl.store(logits + to, y.to(logits.dtype.element_ty), mask=(token < own)[:, None] & (row < k)[None, :])


def _constants(form: Form, shapes: Shapes, tile: Tile) -> dict[str, Any]:
    return {
        "WIDTH": int(shapes["weight"][1]),
        **of_tile(tile),
    }


def _grid(sizes: Mapping[str, Any], constants: Mapping[str, Any], tile: Tile) -> tuple[Any, ...]:
    return token_programs(sizes, tile.tokens) * ceil_div(sizes["k"], tile.rows), 1, 1


KERNEL = GpuKernel(
    SPARSE_HEAD, sparse_head, ("tokens", "groups", "k"), measure, _constants, _grid, tiles, refuses_weights
)
