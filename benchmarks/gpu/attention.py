"""PackedAttention on a GPU: its two launches against float64, and timed beside torch's attention of padded samples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from cases import ATTENTION, RECEIVED, Case, compile_all, short
from graphs import seconds

LAYERS = 8
HEADS = 12
DIMS = {"MiniLM": 32, "BERT": 64}
BATCHES, TOKENS = (1, 8, 32), (16, 48, 128, 256, 512)

Inputs = dict[str, torch.Tensor]


def inputs_of(
    lengths: Sequence[int], heads: tuple[int, int], dim: int, dtype: torch.dtype, *, packed: bool, device: str = "cuda"
) -> Inputs:
    """Random tokens of samples of `lengths`: q, k and v apart, or `packed` in one tensor.

    Args:
        heads: of queries, and of keys.
    """
    tokens, (h, c) = sum(lengths), heads
    widths = {"q": (h + 2 * c) * dim} if packed else {"q": h * dim, "k": c * dim, "v": c * dim}
    made = {name: torch.randn(tokens, width, device=device).to(dtype) for name, width in widths.items()}
    return made | {"offsets": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)}


def attended(inputs: Inputs, heads: tuple[int, int], dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Context, the log-sum-exp of each query, and what each token receives, in float64."""
    wide, (h, c) = {name: tensor.double() for name, tensor in inputs.items()}, heads
    q, k, v = (wide[name] for name in "qkv") if "k" in wide else wide["q"].split([h * dim, c * dim, c * dim], 1)
    context, sums, received = torch.zeros_like(q), q.new_zeros(len(q), h), q.new_zeros(len(q))
    for start, end in itertools.pairwise(inputs["offsets"].tolist()):
        if (n := end - start) == 0:
            continue
        keys, values = (x[start:end].reshape(n, c, dim).repeat_interleave(h // c, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[start:end].reshape(n, h, dim), keys) * dim**-0.5
        if "bias" in wide:
            scores = scores + wide["bias"][..., :n, :n].reshape(-1, n, n)
        weights = scores.softmax(-1)
        context[start:end] = torch.einsum("hqk,khd->qhd", weights, values).flatten(1)
        sums[start:end], received[start:end] = scores.logsumexp(-1).T, weights.mean((0, 1))
    return context, sums, received


def checked(dtype: torch.dtype, device: str = "cuda") -> list[tuple[Case, tuple[torch.Tensor, ...]]]:
    """Calls of both launches, and what they should give: heads of several widths, samples of any length."""
    found = []
    for dim, heads, packed in ((17, (4, 2), False), (32, (12, 12), True), (64, (6, 1), True), (128, (3, 3), False)):
        for lengths in ([1], [0, 33, 1, 128, 0, 70], [300]):
            inputs = inputs_of(lengths, heads, dim, dtype, packed=packed, device=device)
            size = max(lengths) + 1
            bias = torch.randn(1, heads[0], size, size, device=device).to(dtype)
            for given in (inputs, inputs | {"bias": bias}):
                context, sums, received = attended(given, heads, dim)
                attributes: dict[str, int | str] = {"heads": heads[0], "kv_heads": heads[1]}
                found.append((Case(ATTENTION, [given], attributes), (context, sums)))
                second = {name: tensor for name, tensor in given.items() if name != "v"}
                second["log_sum_exp"] = sums.float()
                found.append((Case(RECEIVED, [second], attributes), (received,)))
    return found


def attention(copy: float) -> list[dict[str, Any]]:
    """Time of one layer in half precision: samples of one length, and of random ones, whose padding torch computes."""
    sizes = list(itertools.product(DIMS.items(), BATCHES, TOKENS, (False, True)))
    compile_all(job for dim in DIMS.values() for case in _cases(dim, [16]) for job in case.jobs())
    rows = []
    for (model, dim), batch, tokens, mixed in sizes:
        if mixed and batch == 1:
            continue
        lengths = _lengths(batch, tokens, mixed)
        first, second = _cases(dim, lengths)
        (time_s, tile), (received_s, received_tile) = first.best(), second.best()
        padded = [torch.randn(3, batch, HEADS, tokens, dim, device="cuda", dtype=torch.float16) for _ in range(LAYERS)]
        peer = seconds([partial(torch.nn.functional.scaled_dot_product_attention, *x) for x in padded]) / LAYERS
        products = 4 * sum(n * n for n in lengths) * HEADS * dim
        rows.append({
            "model": model, "batch": batch, "tokens": tokens, "mixed": mixed, "us": time_s * 1e6,
            "received_us": received_s * 1e6, "torch_padded_us": peer * 1e6, "ratio": peer / time_s,
            "tflop_per_s": products / time_s / 1e12, "share_of_copy": 8 * sum(lengths) * HEADS * dim / time_s / copy,
            "tile": short(tile), "received_tile": short(received_tile),
        })  # fmt: skip
        print({key: round(value, 2) if isinstance(value, float) else value for key, value in rows[-1].items()})
    return rows


def _lengths(batch: int, tokens: int, mixed: bool) -> list[int]:
    """One length for all, or random ones of which the longest is `tokens`."""
    if not mixed:
        return [tokens] * batch
    return [tokens, *torch.randint(1, tokens + 1, (batch - 1,)).tolist()]


def _cases(dim: int, lengths: Sequence[int]) -> tuple[Case, Case]:
    """Both launches, of LAYERS layers, q, k and v in one tensor; the first without what the second needs of it."""
    layers = [inputs_of(lengths, (HEADS, HEADS), dim, torch.float16, packed=True) for _ in range(LAYERS)]
    sums = torch.zeros(sum(lengths), HEADS, device="cuda")
    attributes: dict[str, int | str] = {"heads": HEADS}
    return (
        Case(ATTENTION, layers, attributes, ("log_sum_exp",)),
        Case(RECEIVED, [layer | {"log_sum_exp": sums} for layer in layers], attributes),
    )
