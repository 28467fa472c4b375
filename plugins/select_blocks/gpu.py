"""SelectBlocks on a GPU: a program makes one choice, of scores in its registers, or of more, read again and again.

It halves its way to the k-th highest score among the bits that scores have; no sort, no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from trimtab.plugins.dialect import Form
from trimtab.plugins.gpu.kernel import GpuKernel, Shapes, Tile, power_of_two, product
from trimtab.plugins.select_blocks import SELECT_BLOCKS, local_k

__all__ = ["KERNEL", "MOST"]

MOST = 1 << 14
"""Scores that the registers of a program hold; of more it keeps none, and reads them once per pass."""


@triton.jit
def keys_of(scores):
    """Integers in the order of floating-point numbers, of as many bits."""
    scores = tl.where(scores == 0, 0.0, scores).to(scores.dtype)  # -0 is no less than 0
    if scores.dtype == tl.float32:
        bits = scores.to(tl.int32, bitcast=True)
        keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    else:
        bits = scores.to(tl.int16, bitcast=True).to(tl.int32)
        keys = bits ^ ((bits >> 31) & 0x7FFF)
    return keys


@triton.jit
def highest(keys, there, k, BITS: tl.constexpr):
    """Which of `keys` [rows, n] are among the k highest of their row; of equal ones the first. `there`: not padding."""
    limit = tl.min(tl.where(there, keys, 2 ** (BITS - 1) - 1), 1)
    keys = tl.where(there, keys, -(2 ** (BITS - 1)))
    above, count = tl.max(keys, 1), tl.sum(there.to(tl.int32), 1)
    going = tl.sum((count > k).to(tl.int32), 0)
    while going > 0:  # at least k are not below `limit`, and less than k are above `above`
        middle = (above | limit) - ((above ^ limit) >> 1)
        reaching = tl.sum((keys >= middle[:, None]).to(tl.int32), 1)
        limit, above = tl.where(reaching >= k, middle, limit), tl.where(reaching >= k, above, middle - 1)
        count = tl.where(reaching >= k, reaching, count)
        going = tl.sum(((above > limit) & (count > k)).to(tl.int32), 0)
    over = (keys > limit[:, None]) & there
    equal = (keys == limit[:, None]) & there
    room = k - tl.sum(over.to(tl.int32), 1)
    return over | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= room[:, None]))


@triton.jit
def keys_at(from_, at, each, COUNT: tl.constexpr):
    """Keys of the highest scores of `each` tokens at the places `at`."""
    best = keys_of(tl.load(from_ + at, mask=at < COUNT, other=0.0))
    for _ in range(1, each):
        from_ += COUNT
        more = tl.load(from_ + at, mask=at < COUNT, other=0.0)
        best = tl.maximum(best, keys_of(more))
    return best


@triton.jit
def wanted_of(count, take, AT_MOST: tl.constexpr):
    """How many of `count` blocks that reach 0 are taken: at least one, at most `take`; without AT_MOST all of these."""
    if AT_MOST:
        take = tl.minimum(take, tl.maximum(count, 1))
    return take


@triton.jit
def store_none(to, first, take, COLUMNS: tl.constexpr):
    """-1 in the places from `first` to `take`."""
    for start in range(0, take, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        tl.store(to + at, tl.full([COLUMNS], -1, tl.int32), mask=(at >= first) & (at < take))


@triton.jit
def counted(from_, each, least, COUNT: tl.constexpr, COLUMNS: tl.constexpr):
    """How many keys are not below `least`."""
    count = tl.zeros([COLUMNS], tl.int32)
    for start in range(0, COUNT, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        count += ((keys_at(from_, at, each, COUNT) >= least) & (at < COUNT)).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def store_highest(from_, each, k, to, COUNT: tl.constexpr, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """`highest` and the writing of what it finds, for more scores than registers hold."""
    limit = tl.full((), -(2 ** (BITS - 1)), tl.int32)
    above = tl.full((), 2 ** (BITS - 1) - 1, tl.int32)
    count = tl.full((), COUNT, tl.int32)
    while (above > limit) & (count > k):
        middle = (above | limit) - ((above ^ limit) >> 1)
        reaching = counted(from_, each, middle, COUNT, COLUMNS)
        limit, above = tl.where(reaching >= k, middle, limit), tl.where(reaching >= k, above, middle - 1)
        count = tl.where(reaching >= k, reaching, count)
    room = k - counted(from_, each, limit + 1, COUNT, COLUMNS)
    written = 0
    for start in range(0, COUNT, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        keys = keys_at(from_, at, each, COUNT)
        equal = ((keys == limit) & (at < COUNT)).to(tl.int32)
        chosen = ((keys > limit) & (at < COUNT)) | ((equal > 0) & (tl.cumsum(equal, 0) <= room))
        tl.store(to + written + tl.cumsum(chosen.to(tl.int32), 0) - 1, at, mask=chosen)
        room -= tl.sum(equal, 0)
        written += tl.sum(chosen.to(tl.int32), 0)


@triton.jit
def select_blocks(
    scores,
    tokens, groups, take,
    blocks,
    COUNT: tl.constexpr, SHARDS: tl.constexpr, LOCAL: tl.constexpr, BITS: tl.constexpr,
    DENSE_ABOVE: tl.constexpr, AT_MOST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    each = tokens // groups
    from_ = scores + (group * each).to(tl.int64) * COUNT
    dense = False
    if DENSE_ABOVE >= 0:
        dense = tokens > DENSE_ABOVE
    if (take == COUNT) & (dense | (not AT_MOST)):
        for start in range(0, COUNT, COLUMNS):
            at = start + tl.arange(0, COLUMNS)
            tl.store(blocks + group * COUNT + at, at, mask=at < COUNT)
    elif ROWS * COLUMNS < COUNT:
        reach = take
        if AT_MOST:
            reach = counted(from_, each, 0, COUNT, COLUMNS)
        wanted = wanted_of(reach, take, AT_MOST)
        store_highest(from_, each, wanted, blocks + group * take, COUNT, BITS, COLUMNS)
        if AT_MOST:
            store_none(blocks + group * take, wanted, take, COLUMNS)
    else:
        at = tl.arange(0, COLUMNS)[None, :]
        shard = tl.arange(0, ROWS)[:, None]
        there = (shard < SHARDS) & (at < COUNT // SHARDS)
        number = tl.where(there, shard * (COUNT // SHARDS) + at, 0)
        keys = keys_at(from_, number, each, COUNT)
        if SHARDS > 1:
            there = highest(keys, there, LOCAL, BITS)
        keys = tl.reshape(keys, [1, ROWS * COLUMNS])
        there = tl.reshape(there, [1, ROWS * COLUMNS])
        wanted = wanted_of(tl.sum((there & (keys >= 0)).to(tl.int32)), take, AT_MOST)
        chosen = highest(keys, there, wanted, BITS)
        to = blocks + group * take + tl.cumsum(chosen.to(tl.int32), 1) - 1
        tl.store(to, tl.reshape(number, [1, ROWS * COLUMNS]), mask=chosen)
        if AT_MOST:
            store_none(blocks + group * take, wanted, take, ROWS * COLUMNS)


def _measure(shapes: Shapes) -> dict[str, Any]:
    return {
        "tokens": product(shapes["scores"][:-1]),
        "groups": shapes["blocks"][0],
        "take": shapes["blocks"][1],
    }


def _padded(form: Form, shapes: Shapes) -> tuple[int, int]:
    shards = int(form.attributes["shards"])
    return power_of_two(shards), power_of_two(int(shapes["scores"][-1]) // shards)


def _constants(form: Form, shapes: Shapes, tile: Tile) -> dict[str, Any]:
    count = int(shapes["scores"][-1])
    k, shards = (int(form.attributes[name]) for name in ("k", "shards"))
    return {
        "COUNT": count,
        "SHARDS": shards,
        "LOCAL": local_k(k, shards, count),
        "BITS": 32 if form.given["scores"] == "tensor(float)" else 16,
        "DENSE_ABOVE": int(form.attributes["dense_above"]),
        "AT_MOST": int(form.attributes["at_most"]),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
    }


def _grid(sizes: Mapping[str, Any], constants: Mapping[str, Any], tile: Tile) -> tuple[Any, ...]:
    return sizes["groups"], 1, 1


def _tiles(form: Form, shapes: Shapes) -> tuple[Tile, ...]:
    rows, columns = _padded(form, shapes)
    if rows * columns > MOST:
        return Tile(1, 1, 4096, 8), Tile(1, 1, 2048, 8)
    warps = max(1, min(16, rows * columns // 512))
    fewer = (max(1, warps // 2), max(1, warps // 4)) if rows == 1 else ()  # of shards, that takes too many registers
    return tuple(Tile(1, rows, columns, n) for n in dict.fromkeys((warps, *fewer)))


def _refuses(form: Form, shapes: Shapes) -> str | None:
    count = shapes["scores"][-1]
    if not isinstance(count, int):
        return "the size of scores is not known before the engine runs"
    rows, columns = _padded(form, shapes)
    if rows > 1 and rows * columns > MOST // 2:
        return (
            f"{count} scores in {form.attributes['shards']} shards are more than the {MOST // 2} that a program holds"
        )
    return None


KERNEL = GpuKernel(
    SELECT_BLOCKS, select_blocks, ("tokens", "groups", "take"), _measure, _constants, _grid, _tiles, _refuses
)
