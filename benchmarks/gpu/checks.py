"""The kernels on a GPU against float64: every type and tile, alone and in batches."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from attention import checked
from cases import DOWN, HEAD, NEURONS, SELECT, UP, WIDTH, Case, chosen, compile_all, weights

from trimtab.plugins.gpu.kernel import GpuKernel
from trimtab.plugins.gpu.launch import prepared

LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative errors: rounding of the output


def check() -> list[dict[str, Any]]:
    """Every kernel, type and tile, alone and in batches, against float64; outputs hold NaN before."""
    torch.manual_seed(time.time_ns() % (1 << 31))
    cases: list[Checked] = []
    for dtype, kind in product((torch.float16, torch.bfloat16, torch.float32), (None, torch.int8)):
        for tokens, own in ((1, False), (3, True), (5, False), (16, False), (70, False)):
            cases += _products(dtype, kind or dtype, tokens, own, (520, 328, 37))
        if kind is None:
            cases += _selections(dtype)
            cases += [Checked(c.kernel, c.layers[0], c.attributes, expected) for c, expected in checked(dtype)]
        if dtype == torch.float16:
            for tokens in (1, 16):
                cases += _products(dtype, kind or dtype, tokens, False, (NEURONS, WIDTH, 550))
    compile_all(job for case in cases for job in Case(case.kernel, [case.inputs], case.attributes).jobs())
    return [_compared(case) for case in cases]


@dataclass(frozen=True)
class Checked:
    """One call, and what each of its outputs should be."""

    kernel: GpuKernel
    inputs: dict[str, torch.Tensor]
    attributes: dict[str, int | str]
    expected: tuple[torch.Tensor, ...]


def _products(
    dtype: torch.dtype, weight: torch.dtype, tokens: int, own: bool, sizes: tuple[int, int, int], block: int = 2
) -> list[Checked]:
    """SparseUp with and without a gate, SparseDown and SparseHead. sizes: neurons, width, chosen blocks."""
    neurons, width, k = sizes
    up, gate, down = weights(neurons, width, weight), weights(neurons, width, weight), weights(neurons, width, weight)
    scales = {
        name: torch.rand(neurons, device="cuda").to(dtype) / 1000 for name in ("up_scale", "gate_scale", "down_scale")
    }
    if weight != torch.int8:
        scales = {}
    bias = torch.randn(neurons, device="cuda").to(dtype)
    x = torch.randn(tokens, width, device="cuda").to(dtype)
    blocks = chosen(tokens if own else 1, neurons // block, k)
    rows = (blocks.long()[:, :, None] * block + torch.arange(block, device="cuda")).flatten(1).expand(tokens, -1)

    def whole(name: str, w: torch.Tensor) -> torch.Tensor:
        return w.double() * scales[name].double()[:, None] if name in scales else w.double()

    u = torch.einsum("tw,trw->tr", x.double(), whole("up_scale", up)[rows]) + bias.double()[rows]
    g = torch.einsum("tw,trw->tr", x.double(), whole("gate_scale", gate)[rows])
    h = torch.randn(tokens, rows.shape[1], device="cuda").to(dtype)
    y = torch.einsum("tr,trw->tw", h.double(), whole("down_scale", down)[rows])
    both = {"x": x, "blocks": blocks, "up": up, "up_bias": bias, "gate": gate}
    plain = {"x": x, "blocks": blocks, "up": up, "up_bias": bias}
    head = {"x": x, "blocks": blocks, "weight": up, "weight_bias": bias}
    some = {name: scales[name] for name in ("up_scale", "gate_scale") if name in scales}
    first = {name: scales[name] for name in ("up_scale",) if name in scales}
    silu, gelu = torch.nn.functional.silu, torch.nn.functional.gelu
    head_rows = blocks.long().expand(tokens, -1)
    logits = torch.einsum("tw,trw->tr", x.double(), whole("up_scale", up)[head_rows]) + bias.double()[head_rows]
    scale = {"weight_scale": scales["up_scale"]} if scales else {}
    last = {"down_scale": scales["down_scale"]} if scales else {}
    return [
        Checked(UP, both | some, {"activation": "silu", "block": block}, (silu(g) * u,)),
        Checked(UP, plain | first, {"activation": "gelu", "block": block}, (gelu(u),)),
        Checked(DOWN, {"h": h, "blocks": blocks, "down": down} | last, {"block": block}, (y,)),
        Checked(HEAD, head | scale, {}, (logits,)),
    ]


def _selections(dtype: torch.dtype) -> list[Checked]:
    found = []
    for tokens, blocks, k, shared in ((1, 11008, 550, 0), (3, 1000, 37, 0), (5, 1000, 37, 1), (2, 32000, 512, 0)):
        scores = torch.randn(tokens, blocks, device="cuda").to(dtype)  # in half precision many are equal
        of = scores.max(0, keepdim=True).values if shared else scores
        order = torch.sort(of, dim=-1, descending=True, stable=True).indices[:, :k].sort(-1).values
        found.append(Checked(SELECT, {"scores": scores}, {"k": k, "shared": shared}, (order,)))
    return found


def _compared(case: Checked) -> dict[str, Any]:
    """The largest relative error over all tiles."""
    worst = 0.0
    for tile in Case(case.kernel, [case.inputs], case.attributes).tiles():
        run, outputs = prepared(case.kernel, case.inputs, case.attributes, tile)
        for output in outputs:
            output.fill_(-1 if output.dtype == torch.int32 else float("nan"))
        run()
        for output, expected in zip(outputs, case.expected, strict=True):
            error = float((output.double() - expected).norm() / expected.double().norm())
            worst = max(worst, error if error == error else float("inf"))
    first = next(iter(case.inputs.values()))
    limit = 0 if case.kernel is SELECT else LIMITS[first.dtype]
    shapes = {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in case.inputs.items()}
    return {"op": case.kernel.op.name, "inputs": shapes, "error": worst, "right": worst <= limit}
