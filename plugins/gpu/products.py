"""What kernels with weights share, in the Triton language: products with chosen rows, activations."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["activate", "place", "rows_of", "taken_of", "tile_of", "tile_of_tokens", "times_rows", "wide"]


@triton.jit
def place(tokens, groups, TOKENS: tl.constexpr):
    """Group of this program, number of its first token, the tokens from there on that are its own, and its part.

    All programs lie along one axis, since the others end at 65535. Those of the same part, such as the same rows,
    follow each other.
    """
    each = tokens // groups
    tiles = tl.cdiv(each, TOKENS)
    part, at = tl.program_id(0) // (groups * tiles), tl.program_id(0) % (groups * tiles)
    first = (at % tiles) * TOKENS
    return at // tiles, (at // tiles * each + first).to(tl.int64), each - first, part


@triton.jit
def tile_of_tokens(x, first, token, own, column, WIDTH: tl.constexpr, TOKENS: tl.constexpr):
    """Columns of x, [COLUMNS] of one token or [TOKENS, COLUMNS]; zero behind their ends."""
    if TOKENS == 1:
        tile = tl.load(x + first * WIDTH + column, mask=column < WIDTH, other=0.0)
    else:
        at = (first + token)[:, None] * WIDTH + column[None, :]
        tile = tl.load(x + at, mask=(token < own)[:, None] & (column < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def rows_of(blocks, group, row, k, BLOCK: tl.constexpr):
    """Numbers of the neurons at the places `row` of a choice of k blocks; row 0 behind its end and for -1."""
    number = tl.load(blocks + group * k + row // BLOCK, mask=row < k * BLOCK, other=-1)
    return tl.where(number >= 0, number * BLOCK + row % BLOCK, 0).to(tl.int64)


@triton.jit
def taken_of(blocks, group, row, k, BLOCK: tl.constexpr, AT_MOST: tl.constexpr):
    """Whether there is a neuron at the places `row`; without AT_MOST, whoever asks has to mask those behind the end."""
    if AT_MOST:
        taken = tl.load(blocks + group * k + row // BLOCK, mask=row < k * BLOCK, other=-1) >= 0
    else:
        taken = row >= 0
    return taken


@triton.jit
def tile_of(w, number, taken, column, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, AT_MOST: tl.constexpr):
    """Columns of chosen rows of the weights w, [rows, COLUMNS]; zero behind the end of the rows.

    With AT_MOST, rows that are not `taken` are not read, and zero.
    """
    from_ = w + number[:, None] * WIDTH + column[None, :]
    if AT_MOST:
        mask = taken[:, None] & (column < WIDTH)[None, :]
        tile = tl.load(from_, mask=mask, other=0, eviction_policy="evict_first")
    elif WIDTH % COLUMNS == 0:
        tile = tl.load(from_, eviction_policy="evict_first")
    else:
        tile = tl.load(from_, mask=(column < WIDTH)[None, :], other=0, eviction_policy="evict_first")
    return tile


@triton.jit
def wide(w):
    """In float32. An integer becomes the last bits of a large float: GPUs add four times as fast as they convert."""
    if w.dtype == tl.int8:
        wide_ = (w.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
    else:
        wide_ = w.to(tl.float32)
    return wide_


@triton.jit
def times_rows(x, w, total):
    """`total` + the products of a tile of x, [COLUMNS] or [tokens, COLUMNS], with a tile of weights, [rows, COLUMNS].

    Of a single token, products stay apart, [rows, COLUMNS], and are summed when all are there.
    """
    if len(x.shape) == 1:
        total += wide(w) * x.to(tl.float32)[None, :]
    else:
        total = tl.dot(x, tl.trans(w.to(x.dtype)), total, input_precision="ieee")
    return total


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of that name, in float32."""
    if ACTIVATION == "relu":
        y = tl.maximum(x, 0.0)
    elif ACTIVATION == "relu_squared":
        y = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        y = x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # tanh(u) = 2 sigmoid(2u) - 1, so half of 1 + tanh(u) is sigmoid(2u)
        y = x * tl.sigmoid(2 * 0.7978845608028654 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "quick_gelu":
        y = x * tl.sigmoid(1.702 * x)
    elif ACTIVATION == "sigmoid":
        y = tl.sigmoid(x)
    elif ACTIVATION == "tanh":
        y = 2 * tl.sigmoid(2 * x) - 1
    else:
        tl.static_assert(ACTIVATION == "identity")
        y = x
    return y
