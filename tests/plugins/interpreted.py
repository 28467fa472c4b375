"""The child of test_gpu.py: kernels of a GPU on the CPU, by the Triton language's interpreter, against float64.

`TRITON_INTERPRET=1 python interpreted.py OP SEED`; fails where a launch is not what the op should give.
"""

from __future__ import annotations

import random
import sys

import torch
from interpreted_attention import attention

from trimtab.plugins.gather_blocks.gpu import KERNEL as GATHER
from trimtab.plugins.gpu.launch import form_of, prepared
from trimtab.plugins.select_blocks.gpu import KERNEL as SELECT
from trimtab.plugins.sparse_down.gpu import KERNEL as DOWN
from trimtab.plugins.sparse_head.gpu import KERNEL as HEAD
from trimtab.plugins.sparse_up.gpu import KERNEL as UP

TYPES = (torch.float32, torch.float16, torch.bfloat16)
LIMITS = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
NEURONS, WIDTH = 28, 72  # no multiples of a tile
ACTIVATIONS = {
    "identity": lambda z: z, "relu": torch.relu, "relu_squared": lambda z: torch.relu(z) ** 2,
    "silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z), "sigmoid": torch.sigmoid, "tanh": torch.tanh,
}  # fmt: skip


def run_all_tiles(kernel, inputs, attributes, expected, few=3):
    """Every output is written, and right, for some random tiles."""
    dtype = next(iter(inputs.values())).dtype
    tiles = kernel.tiles(form_of(kernel, inputs, attributes), {name: list(t.shape) for name, t in inputs.items()})
    if dtype == torch.bfloat16:  # the interpreter multiplies matrices of bfloat16 by their bits
        tiles = [tile for tile in tiles if tile.tokens == 1]
    for tile in random.sample(list(tiles), min(few, len(tiles))):
        run, (output,) = prepared(kernel, inputs, attributes, tile)
        output.fill_(-2 if output.dtype == torch.int32 else float("nan"))
        run()
        told = kernel.op.name, tile, attributes, {name: (t.dtype, list(t.shape)) for name, t in inputs.items()}
        assert list(output.shape) == list(expected.shape), told
        if output.dtype == torch.int32:
            assert torch.equal(output.long(), expected), told
        else:
            error = float((output.double() - expected).norm() / expected.norm().clamp(min=1))  # of relu, it may be 0
            assert error < LIMITS[dtype], (error, *told)


def best(scores, k):
    """The k highest, of equal ones the first, ascending."""
    order = torch.sort(scores.float(), dim=-1, descending=True, stable=True).indices
    return order[:, :k].sort(-1).values


def reached(scores, k):
    """Of the best k those that are not below 0, and always the first of the best; -1 behind them."""
    found = best(scores, k)
    theirs = scores.float().gather(1, found)
    taken = (theirs >= 0) | (found == scores.float().argmax(-1, keepdim=True))
    return torch.where(taken, found, scores.shape[1]).sort(-1).values.where(taken.sort(-1, descending=True).values, -1)


def select():
    for dtype in TYPES:
        tokens, count = random.choice((1, 3)), random.choice((33, 700))
        scores = torch.randn(tokens, count).to(dtype)
        scores[:, ::7] = scores[:, :1]  # equal ones
        scores[:, 5] = float("-inf")
        k = random.randint(1, count - 1)
        run_all_tiles(SELECT, {"scores": scores}, {"k": k}, best(scores, k))
        run_all_tiles(SELECT, {"scores": scores}, {"k": count}, torch.arange(count).expand(tokens, -1))
        shared = best(scores.float().max(0, keepdim=True).values, k)
        run_all_tiles(SELECT, {"scores": scores}, {"k": k, "shared": 1}, shared)
        run_all_tiles(SELECT, {"scores": scores}, {"k": k, "dense_above": tokens - 1}, torch.arange(count)[None])
        run_all_tiles(SELECT, {"scores": scores}, {"k": k, "dense_above": tokens}, best(scores, k))
        level = random.choice((-9, -1, 0, 1, 9))
        for most in (k, count):
            moved = scores + level
            run_all_tiles(SELECT, {"scores": moved}, {"k": most, "at_most": 1}, reached(moved, most))
        union = reached(moved.max(0, keepdim=True).values, k)
        run_all_tiles(SELECT, {"scores": moved}, {"k": k, "at_most": 1, "shared": 1}, union)
        every = {"k": k, "at_most": 1, "dense_above": tokens - 1}
        run_all_tiles(SELECT, {"scores": moved}, every, torch.arange(count)[None])
    many = torch.randn(2, 20000).half()  # more than registers hold, and many of them equal
    run_all_tiles(SELECT, {"scores": many}, {"k": 999}, best(many, 999))
    run_all_tiles(SELECT, {"scores": many}, {"k": 999, "shared": 1}, best(many.max(0, keepdim=True).values, 999))
    for level in (-9, -2, 0):
        run_all_tiles(SELECT, {"scores": many + level}, {"k": 999, "at_most": 1}, reached(many + level, 999))
    scores = torch.randn(3, 12 * 10)
    shards = scores.reshape(3, 12, 10)
    kept = torch.full_like(shards, float("-inf"))
    local = shards.topk(3).indices  # ceil(30 / 12) of each
    kept.scatter_(2, local, shards.gather(2, local))
    run_all_tiles(SELECT, {"scores": scores}, {"k": 30, "shards": 12}, best(kept.reshape(3, -1), 30))


def weights(name, int8, dtype, rows=NEURONS, width=WIDTH):
    """The inputs of a matrix, and what it stands for."""
    if not int8:
        w = (torch.randn(rows, width) / width**0.5).to(dtype)
        return {name: w}, w.double()
    w, scale = torch.randint(-128, 128, (rows, width), dtype=torch.int8), (torch.rand(rows) / 500).to(dtype)
    return {name: w, f"{name}_scale": scale}, w.double() * scale.double()[:, None]


def choices(block):
    """(tokens, blocks, rows of each token) where each has its own choice, where all share one, and a whole prompt."""
    count = NEURONS // block
    cases = (1, 1, 5), (3, 3, 5), (random.randint(2, 19), 1, 7), (17, 1, count)
    for tokens, groups, k in random.sample(cases, 2):
        blocks = torch.stack([torch.randperm(count)[:k].sort().values for _ in range(groups)]).int()
        rows = (blocks.long()[:, :, None] * block + torch.arange(block)).flatten(1)
        yield tokens, blocks, rows.expand(tokens, -1)


def cut(blocks, h):
    """Of each choice the first blocks, some or none, and -1 behind; and h with zeros there."""
    k = blocks.shape[1]
    there = torch.arange(k) < torch.tensor([random.randint(0, k) for _ in blocks])[:, None]
    return blocks.where(there, -1), h * there.repeat_interleave(h.shape[1] // k, 1)


def up():
    for dtype in TYPES:
        block, activation = random.choice((1, 4)), random.choice(list(ACTIVATIONS))
        for tokens, blocks, rows in choices(block):
            x, bias = torch.randn(tokens, WIDTH).to(dtype), torch.randn(NEURONS).to(dtype)
            first, u = weights("up", random.random() < 0.5, dtype)
            second, g = weights("gate", "up_scale" in first, dtype)
            u = torch.einsum("tw,trw->tr", x.double(), u[rows])
            g = torch.einsum("tw,trw->tr", x.double(), g[rows]) + bias.double()[rows]
            act = ACTIVATIONS[activation]
            told = {"block": block, "activation": activation}
            gated = {"x": x, "blocks": blocks, **first, **second, "gate_bias": bias}
            run_all_tiles(UP, gated, told, act(g) * u, few=1)
            plain = {"x": x, "blocks": blocks, **first, "up_bias": bias}
            run_all_tiles(UP, plain, told, act(u + bias.double()[rows]), few=1)
            fewer, expected = cut(blocks, act(g) * u)
            run_all_tiles(UP, gated | {"blocks": fewer}, told | {"at_most": 1}, expected, few=1)


def down():
    for dtype in TYPES:
        block = random.choice((1, 4))
        for tokens, blocks, rows in choices(block):
            h = torch.randn(tokens, rows.shape[1]).to(dtype)
            inputs, w = weights("down", random.random() < 0.5, dtype)
            expected = torch.einsum("tr,trw->tw", h.double(), w[rows])
            run_all_tiles(DOWN, {"h": h, "blocks": blocks, **inputs}, {"block": block}, expected)
            fewer, used = cut(blocks, h.double())
            expected = torch.einsum("tr,trw->tw", used, w[rows])
            given = {"h": h, "blocks": fewer, **inputs}  # what h holds elsewhere is not read
            run_all_tiles(DOWN, given, {"block": block, "at_most": 1}, expected)


def gather():
    for dtype in TYPES:
        block = random.choice((1, 4))
        for tokens, blocks, rows in choices(block):
            x = torch.randn(tokens, NEURONS).to(dtype)
            expected = x.double().gather(1, rows)
            run_all_tiles(GATHER, {"x": x, "blocks": blocks}, {"block": block}, expected)
            fewer, used = cut(blocks, expected)
            run_all_tiles(GATHER, {"x": x, "blocks": fewer}, {"block": block, "at_most": 1}, used)


def head():
    for dtype in TYPES:
        for tokens, blocks, rows in choices(1):
            x, bias = torch.randn(tokens, WIDTH).to(dtype), torch.randn(NEURONS).to(dtype)
            inputs, w = weights("weight", random.random() < 0.5, dtype)
            logits = torch.einsum("tw,trw->tr", x.double(), w[rows])
            run_all_tiles(HEAD, {"x": x, "blocks": blocks, **inputs}, {}, logits, few=1)
            biased = {"x": x, "blocks": blocks, **inputs, "weight_bias": bias}
            run_all_tiles(HEAD, biased, {}, logits + bias.double()[rows], few=1)


if __name__ == "__main__":
    random.seed(int(sys.argv[2]))
    torch.manual_seed(int(sys.argv[2]))
    ops = {
        "SelectBlocks": select, "SparseUp": up, "GatherBlocks": gather, "SparseDown": down, "SparseHead": head,
        "PackedAttention": attention,
    }  # fmt: skip
    ops[sys.argv[1]]()
