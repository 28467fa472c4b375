"""Products whose operands are rounded like in a pass after `recover`, with straight-through gradients.

Bengio, Léonard, Courville 2013 ("Estimating or propagating gradients through stochastic neurons"): gradients treat the
rounding as the identity, so weights learn to work after rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.passes.contract import Rounding
from trimtab.passes.matrices.quantize import TYPICAL

_LEVELS = 255  # largest level of an activation, uint8


class _StraightThrough(torch.autograd.Function):
    """Returns `rounded`; its gradient is passed to `x` unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def rounded_activations(x: Tensor, *, per_row: bool = False) -> Tensor:
    """`x` [...] rounded like ONNX's DynamicQuantizeLinear: 256 levels over the range of its values and 0.

    Args:
        per_row: each row (last axis) has its own levels, as in Int8Linear.
    """
    x = x.float()
    with torch.no_grad():  # elementary operations: torch's own fake_quantize takes twice to eight times as long
        least, greatest = torch.aminmax(x, dim=-1, keepdim=True) if per_row else torch.aminmax(x)
        least, greatest = least.clamp_max(0), greatest.clamp_min(0)
        scale = ((greatest - least) / _LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
        zero = (-least / scale).round().clamp(0, _LEVELS)
        rounded = (x / scale).round_().clamp_(-zero, _LEVELS - zero).mul_(scale)
    return _through(x, rounded)


def rounded_weight(weight: Tensor, axis: int, rounding: Rounding) -> Tensor:
    """`weight` [in_features, out_features], or transposed, as symmetric integers times a scale.

    Args:
        axis: axis of the output features.
    """
    weight = weight.float()
    with torch.no_grad():
        size = weight.abs()
        largest = size.amax(1 - axis, keepdim=True) if rounding.per_channel else size.amax()
        scale = (largest / rounding.largest).clamp_min(torch.finfo(torch.float32).tiny)
        rounded = (weight / scale).round_().mul_(scale)
    return _through(weight, rounded)


def rounded_blocks(weight: Tensor, block: int) -> Tensor:
    """`weight` [out_features, in_features] rounded to int4 with a scale per `block` inputs of an output; no gradient.

    Rounds like `trimtab.passes.matrices.quantize.round_to_nearest` without a search; scales are rounded to bfloat16.
    """
    with torch.no_grad():
        blocks = weight.detach().float().unflatten(1, (-1, block))
        scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 7 * TYPICAL
        scale = scale.bfloat16().float()
        rounded: Tensor = (blocks / scale).round_().clamp_(-8, 7).mul_(scale).flatten(1)
    return rounded


def _through(x: Tensor, rounded: Tensor) -> Tensor:
    through: Tensor = _StraightThrough.apply(x, rounded)
    return through
