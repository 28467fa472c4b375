"""SparseUp on a GPU: a program reads a few chosen rows of `up` and `gate`, whole, for tokens that share them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from trimtab.plugins.dialect import Form
from trimtab.plugins.gpu.kernel import (
    GpuKernel,
    Shapes,
    Tile,
    ceil_div,
    of_tile,
    power_of_two,
    product,
    token_programs,
)
from trimtab.plugins.gpu.products import activate, place, rows_of, taken_of, tile_of, tile_of_tokens, times_rows
from trimtab.plugins.sparse_up import SPARSE_UP

__all__ = ["KERNEL", "measure", "refuses_weights", "tiles"]


@triton.jit
def sparse_up(
    x, blocks, up, up_scale, up_bias, gate, gate_scale, gate_bias, importance,
    tokens, groups, k,
    h,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, AT_MOST: tl.constexpr, ACTIVATION: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    group, first, own, part = place(tokens, groups, TOKENS)
    row = part * ROWS + tl.arange(0, ROWS)
    number = rows_of(blocks, group, row, k, BLOCK)
    taken = taken_of(blocks, group, row, k, BLOCK, AT_MOST)
    token = tl.arange(0, TOKENS)
    if TOKENS == 1:
        u = tl.zeros([ROWS, COLUMNS], tl.float32)
    else:
        u = tl.zeros([TOKENS, ROWS], tl.float32)
    g = u
    for start in tl.range(0, WIDTH, COLUMNS, num_stages=STAGES):
        column = start + tl.arange(0, COLUMNS)
        tile = tile_of_tokens(x, first, token, own, column, WIDTH, TOKENS)
        u = times_rows(tile, tile_of(up, number, taken, column, WIDTH, COLUMNS, AT_MOST), u)
        if gate is not None:
            g = times_rows(tile, tile_of(gate, number, taken, column, WIDTH, COLUMNS, AT_MOST), g)
    if TOKENS == 1:
        u = tl.sum(u, 1)[None, :]
        g = tl.sum(g, 1)[None, :]
    if up_scale is not None:
        u *= tl.load(up_scale + number).to(tl.float32)[None, :]
    if up_bias is not None:
        u += tl.load(up_bias + number).to(tl.float32)[None, :]
    if gate is not None:
        if gate_scale is not None:
            g *= tl.load(gate_scale + number).to(tl.float32)[None, :]
        if gate_bias is not None:
            g += tl.load(gate_bias + number).to(tl.float32)[None, :]
        u *= activate(g, ACTIVATION)
    else:
        u = activate(u, ACTIVATION)
    if AT_MOST:
        u = tl.where(taken[None, :], u, 0.0)
    to = (first + token)[:, None] * (k * BLOCK) + row[None, :]
    tl.store(h + to, u.to(h.dtype.element_ty), mask=(token < own)[:, None] & (row < k * BLOCK)[None, :])


def measure(shapes: Shapes) -> dict[str, Any]:
    """Run-time sizes of an op that reads x, or h, and blocks."""
    first = "x" if "x" in shapes else "h"
    return {"tokens": product(shapes[first][:-1]), "groups": shapes["blocks"][0], "k": shapes["blocks"][1]}


def refuses_weights(form: Form, shapes: Shapes) -> str | None:
    """Why there is no kernel for these weights."""
    for name, kind in form.given.items():
        if kind == "tensor(uint8)":
            return f"{name} is int4, which the GPU kernels do not read"
    return None


def _refuses(form: Form, shapes: Shapes) -> str | None:
    if int(form.attributes["keep"]) > 0:
        return "keep looks at all activations of a token, which one launch that spreads over the GPU cannot"
    return refuses_weights(form, shapes)


def tiles(form: Form, shapes: Shapes) -> tuple[Tile, ...]:
    """Whole rows for single tokens, so that all of a program's reads are on their way at once."""
    name = "up" if "up" in shapes else "weight"
    wide = power_of_two(int(shapes[name][1]))
    size = 4 if form.given[name] == "tensor(float)" else 2  # bytes; float32 fills registers twice
    long, half = min(wide, 8192 // size), min(wide, 4096 // size)
    one = Tile(1, 1, half, 4), Tile(1, 1, long, 8), Tile(1, 2, half, 8), Tile(1, 4, min(half, 1024), 8)
    if form.given["x"] == "tensor(float)":  # no matrix units: sums and both factors lie in registers
        many = [(32, 16, 32, 4, 2), (32, 32, 32, 4, 2), (64, 32, 32, 8, 2)]
    elif form.given[name] == "tensor(int8)":  # more warps, since what the integers become takes registers
        many = [(16, 8, 128, 4, 3), (16, 16, 128, 4, 3), (64, 64, 32, 8, 3)]
    else:
        stages = 3 if form.attributes.get("at_most") else 2  # before sm_90 counts and two stages spill a register
        many = [(16, 8, 128, 2, 4), (16, 8, 256, 4, stages), (16, 16, 128, 2, 4), (64, 64, 32, 4, 3)]
    return (*one, *(Tile(t, rows, min(wide, columns), *rest) for t, rows, columns, *rest in many))


def _constants(form: Form, shapes: Shapes, tile: Tile) -> dict[str, Any]:
    return {
        "WIDTH": int(shapes["up"][1]),
        "BLOCK": int(form.attributes["block"]),
        "AT_MOST": int(form.attributes["at_most"]),
        "ACTIVATION": str(form.attributes["activation"]),
        **of_tile(tile),
    }


def _grid(sizes: Mapping[str, Any], constants: Mapping[str, Any], tile: Tile) -> tuple[Any, ...]:
    return token_programs(sizes, tile.tokens) * ceil_div(sizes["k"] * constants["BLOCK"], tile.rows), 1, 1


KERNEL = GpuKernel(SPARSE_UP, sparse_up, ("tokens", "groups", "k"), measure, _constants, _grid, tiles, _refuses)
