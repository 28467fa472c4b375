"""PackedAttention on a GPU: a program has some queries of one head of a sample, and passes over the sample's keys.

Scores stay in registers, with the maximum and the sum of each query beside them (online softmax, arXiv 1805.02867; in
tiles as FlashAttention has it, arXiv 2205.14135), in float32. `received` is a sum over all queries and heads, which are
those of many programs. Outputs are not zeroed and sums of programs would come in any order; so it is a second launch,
which has a program for some keys of a sample and computes their scores again, with the log-sum-exp of each query as the
first launch left it. A sample is divided by its own length alone: its results are the same bits in any batch.

What bounds it, of samples of n tokens, h heads of d numbers, in half precision (H200: 4.8 TB/s, 989 TFLOP/s dense, and
132 · 16 exponentials a cycle, 3.9 T/s):

- memory: q, k, v and context once, 8 n h d bytes;
- matrix units: 4 n² h d operations; exponentials: n² h.

Up to 300 tokens of heads of 32 (600 of 64) memory takes longest, beyond that exponentials. MiniLM's 12 heads of 32, 32
samples: of 48 tokens 1.0 us of memory, less than a launch; of 256 tokens 5.2 us of memory, 6.5 us of exponentials and
3.3 us of products. `received` adds one launch, n² h exponentials and 2 n² h d operations. None of it was measured: no
GPU has run these kernels yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from trimtab.plugins.dialect import Form
from trimtab.plugins.gpu.kernel import GpuKernel, Shapes, Tile, power_of_two
from trimtab.plugins.packed_attention.launches import ATTENTION_RECEIVED, ATTENTION_ROWS

__all__ = ["KERNELS", "MOST_DIM"]

MOST_DIM = 128
"""Numbers of a head that the registers of a program hold beside everything else."""

LOG2_E = tl.constexpr(1.4426950408889634)
SAMPLES = tl.constexpr(128)  # whose offsets are read at a time


@triton.jit
def own_block(offsets, slot, tokens, ends, BLOCK: tl.constexpr):
    """First row and length of the sample that the block `slot` is of, and the block's place within the sample.

    Sample b has the blocks from offsets[b] // BLOCK + b on, which are as many as its tokens need or one more; so nobody
    has to count them. A block behind the sample's end, and that of no sample, has no tokens: its place is not below the
    length.
    """
    before = 0
    for start in range(0, ends - 1, SAMPLES):
        sample = start + tl.arange(0, SAMPLES)
        first = tl.load(offsets + sample, mask=sample < ends - 1, other=0)
        before += tl.sum(((first // BLOCK + sample <= slot) & (sample < ends - 1)).to(tl.int32), 0)
    first = tl.load(offsets + before - 1, mask=before > 0, other=0)
    end = tl.minimum(tl.load(offsets + before, mask=before > 0, other=0), tokens)
    return first.to(tl.int64), end - first, (slot - first // BLOCK - before + 1) * BLOCK


@triton.jit
def tile_at(x, row, dim, length, ROW: tl.constexpr, DIM: tl.constexpr):
    """Rows `row` of one head, [rows, dims]; zero behind the end of the sample and of the head."""
    return tl.load(
        x + row[:, None] * ROW + dim[None, :], mask=(row < length)[:, None] & (dim < DIM)[None, :], other=0.0
    )


@triton.jit
def biases(bias, query, key, length, head, places, bias_heads):
    """Those of the places `query` and `key`, one of them [n, 1] and the other [1, n], in float32."""
    at = bias + tl.where(bias_heads > 1, head, 0).to(tl.int64) * places * places
    return tl.load(at + query * places + key, mask=(query < length) & (key < length), other=0.0).to(tl.float32)


@triton.jit
def packed_attention(
    q, k, v, offsets, bias, scale,
    tokens, ends, places, bias_heads,
    context, log_sum_exp,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    Q_ROW: tl.constexpr, KV_ROW: tl.constexpr, SCALE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    first, length, at = own_block(offsets, tl.program_id(0) // HEADS, tokens, ends, QUERIES)
    if k is None:  # q holds all three side by side
        k = q + HEADS * DIM
        v = k + HEADS // GROUP * DIM
    k += first * KV_ROW + head // GROUP * DIM
    v += first * KV_ROW + head // GROUP * DIM
    if scale is not None:
        factor = tl.load(scale) * LOG2_E
    else:
        factor = SCALE * LOG2_E
    query, dim = at + tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    own = tile_at(q + first * Q_ROW + head * DIM, query, dim, length, Q_ROW, DIM)
    most = tl.full([QUERIES], float("-inf"), tl.float32)  # in powers of 2, as all scores are
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, WIDTH], tl.float32)
    for start in tl.range(0, tl.where(at < length, length, 0), KEYS, num_stages=STAGES):
        key = start + tl.arange(0, KEYS)
        scores = tl.dot(own, tl.trans(tile_at(k, key, dim, length, KV_ROW, DIM)), input_precision="ieee") * factor
        if bias is not None:
            scores += biases(bias, query[:, None], key[None, :], length, head, places, bias_heads) * LOG2_E
        scores = tl.where((key < length)[None, :], scores, float("-inf"))
        larger = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(larger == float("-inf"), 0.0, larger)  # where a bias hides all keys so far
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(most - base)
        total = total * decay + tl.sum(weights, 1)
        values = tile_at(v, key, dim, length, KV_ROW, DIM)
        sums = tl.dot(weights.to(values.dtype), values, sums * decay[:, None], input_precision="ieee")
        most = larger
    there = (query < length)[:, None] & (dim < DIM)[None, :]
    to = context + first * (HEADS * DIM) + head * DIM + query[:, None] * (HEADS * DIM) + dim[None, :]
    tl.store(to, (sums / total[:, None]).to(context.dtype.element_ty), mask=there)
    if log_sum_exp is not None:
        result = (most + tl.log2(total)) / LOG2_E
        tl.store(log_sum_exp + first * HEADS + head + query * HEADS, result, mask=query < length)


@triton.jit
def attention_received(
    q, k, offsets, bias, scale, log_sum_exp,
    tokens, ends, places, bias_heads,
    received,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    Q_ROW: tl.constexpr, KV_ROW: tl.constexpr, SCALE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first, length, at = own_block(offsets, tl.program_id(0), tokens, ends, KEYS)
    if k is None:
        k = q + HEADS * DIM
    q += first * Q_ROW
    k += first * KV_ROW
    log_sum_exp += first * HEADS
    if scale is not None:
        factor = tl.load(scale) * LOG2_E
    else:
        factor = SCALE * LOG2_E
    key, dim = at + tl.arange(0, KEYS), tl.arange(0, WIDTH)
    sums = tl.zeros([KEYS], tl.float32)
    blocks = tl.cdiv(length, QUERIES)
    steps = tl.where(at < length, HEADS * blocks, 0)
    for step in tl.range(0, steps, num_stages=STAGES):  # one loop, so that loads are ahead across heads too
        head = step // blocks
        query = step % blocks * QUERIES + tl.arange(0, QUERIES)
        keys = tile_at(k + head // GROUP * DIM, key, dim, length, KV_ROW, DIM)
        queries = tile_at(q + head * DIM, query, dim, length, Q_ROW, DIM)
        scores = tl.dot(keys, tl.trans(queries), input_precision="ieee") * factor
        if bias is not None:
            scores += biases(bias, query[None, :], key[:, None], length, head, places, bias_heads) * LOG2_E
        base = tl.load(log_sum_exp + query * HEADS + head, mask=query < length, other=float("inf")) * LOG2_E
        sums += tl.sum(tl.exp2(scores - base[None, :]), 1)
    tl.store(received + first + key, sums / (HEADS * length), mask=key < length)


def _measure(shapes: Shapes) -> dict[str, Any]:
    bias = shapes.get("bias", (1, 1))
    return {
        "tokens": shapes["q"][0],
        "ends": shapes["offsets"][0],
        "places": bias[-1],
        "bias_heads": bias[-3] if len(bias) > 2 else 1,
    }


def _heads(form: Form) -> tuple[int, int]:
    """Of queries, and of keys and values."""
    heads, kv_heads = int(form.attributes["heads"]), int(form.attributes["kv_heads"])
    return heads, kv_heads or heads


def _columns(form: Form) -> int:
    """Heads whose numbers are side by side in a row of q."""
    heads, kv_heads = _heads(form)
    return heads if "k" in form.given else heads + 2 * kv_heads


def _dim(form: Form, shapes: Shapes) -> int:
    return int(shapes["q"][-1]) // _columns(form)


def _refuses(form: Form, shapes: Shapes) -> str | None:
    heads, kv_heads = _heads(form)
    width = (shapes.get("q") or [None])[-1]
    if not isinstance(width, int) or width < 1:
        return "the width of q is not known before the engine runs"
    if heads < 1 or kv_heads < 1 or heads % kv_heads or width % _columns(form):
        return "the width of q is no multiple of its heads, or these are none of those of k"
    if (dim := _dim(form, shapes)) > MOST_DIM:
        return f"heads of {dim} numbers are wider than the {MOST_DIM} that a program holds"
    if len({form.given[name] for name in ("q", "k", "v") if name in form.given}) > 1:
        return "q, k and v are of several types"
    return None


def _refuses_rows(form: Form, shapes: Shapes) -> str | None:
    if ("k" in form.given) != ("v" in form.given):
        return "k and v are given both or not at all"
    return _refuses(form, shapes)


def _width(form: Form, shapes: Shapes) -> int:
    """Of tiles: matrix units multiply 16 numbers at a time."""
    return max(16, power_of_two(_dim(form, shapes)))


def _constants(form: Form, shapes: Shapes, tile: Tile) -> dict[str, Any]:
    (heads, kv_heads), dim = _heads(form), _dim(form, shapes)
    return {
        "HEADS": heads,
        "GROUP": heads // kv_heads,
        "DIM": dim,
        "WIDTH": _width(form, shapes),
        "Q_ROW": _columns(form) * dim,
        "KV_ROW": (kv_heads if "k" in form.given else _columns(form)) * dim,
        "SCALE": dim**-0.5,
        "QUERIES": tile.tokens,
        "KEYS": tile.rows,
        "STAGES": tile.stages,
    }


def _blocks(sizes: Mapping[str, Any], block: int) -> Any:
    """At least as many as the samples have (see `own_block`), and one, since a launch of none is an error."""
    return sizes["tokens"] // block + sizes["ends"]


def _rows_grid(sizes: Mapping[str, Any], constants: Mapping[str, Any], tile: Tile) -> tuple[Any, ...]:
    return _blocks(sizes, tile.tokens) * constants["HEADS"], 1, 1


def _received_grid(sizes: Mapping[str, Any], constants: Mapping[str, Any], tile: Tile) -> tuple[Any, ...]:
    return _blocks(sizes, tile.rows), 1, 1


def _rows_tiles(form: Form, shapes: Shapes) -> tuple[Tile, ...]:
    """Queries of a program by keys at a time. A bias and wide heads take registers, so tiles are smaller then."""
    width, biased = _width(form, shapes), "bias" in form.given
    if form.given["q"] == "tensor(float)":  # no matrix units: sums and both factors lie in registers
        sizes = [(16, 32, 4, 1), (16, 16, 4, 1), *([(32, 32, 4, 1)] if width <= 64 else [])]
    elif biased and width > 64:
        sizes = [(16, 32, 2, 1), (64, 32, 8, 1), (16, 16, 2, 1)]
    elif biased:
        sizes = [(64, 32, 4, 2), (16, 32, 1, 2), (32, 64, 4, 2), (16, 16, 2, 1)]
    else:
        sizes = [(64, 32, 4, 2), (16, 32, 1, 2), (16, 64, 2, 2), (32, 64, 4, 2)]
        sizes += [(64, 64, 8, 2), (128, 32, 8, 2)] if width <= 64 else []
    return tuple(Tile(queries, keys, width, warps, stages) for queries, keys, warps, stages in sizes)


def _received_tiles(form: Form, shapes: Shapes) -> tuple[Tile, ...]:
    """Queries at a time by keys of a program: few keys, as a sample has no programs but for its keys."""
    width = _width(form, shapes)
    if form.given["q"] == "tensor(float)":
        sizes = [(16, 32, 4, 1), (16, 16, 4, 1), *([(32, 32, 4, 1)] if width <= 64 else [])]
    else:
        sizes = [(64, 16, 2, 2), (32, 16, 1, 2), (64, 32, 4, 2), *([(32, 64, 4, 2)] if width <= 64 else [])]
    return tuple(Tile(queries, keys, width, warps, stages) for queries, keys, warps, stages in sizes)


_SIZES = ("tokens", "ends", "places", "bias_heads")

KERNELS = (
    GpuKernel(ATTENTION_ROWS, packed_attention, _SIZES, _measure, _constants, _rows_grid, _rows_tiles, _refuses_rows),
    GpuKernel(
        ATTENTION_RECEIVED, attention_received, _SIZES, _measure, _constants, _received_grid, _received_tiles, _refuses
    ),
)
