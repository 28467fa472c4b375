"""Products whose operands are rounded as a pass behind `recover` will round them, with gradients straight through.

Bengio, Léonard, Courville 2013 ("Estimating or propagating gradients through stochastic neurons"): the rounding counts
as the identity when gradients are computed, so weights learn to do well where they will be put.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.passes.contract import Rounding
from trimtab.passes.matrices.quantize import TYPICAL

_LEVELS = 255  # of an activation, uint8


class _StraightThrough(torch.autograd.Function):
    """`rounded`, whose gradient goes to `x` as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def rounded_activations(x: Tensor, *, per_row: bool = False) -> Tensor:
    """`x` [...] as ONNX's DynamicQuantizeLinear keeps it: 256 levels from its least to its greatest value, and 0.

    Args:
        per_row: levels of its own for each row, the last axis, as Int8Linear has them.
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
        axis: of the output features.
    """
    weight = weight.float()
    with torch.no_grad():
        size = weight.abs()
        most = size.amax(1 - axis, keepdim=True) if rounding.per_channel else size.amax()
        scale = (most / rounding.largest).clamp_min(torch.finfo(torch.float32).tiny)
        rounded = (weight / scale).round_().mul_(scale)
    return _through(weight, rounded)


def rounded_blocks(weight: Tensor, block: int) -> Tensor:
    """`weight` [out_features, in_features] as int4, a scale for `block` inputs of each output; without a gradient.

    As `trimtab.passes.matrices.quantize.round_to_nearest` rounds without a search, scales to bfloat16.
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
