"""Products whose operands are rounded as a pass behind `recover` will round them, with gradients straight through.

Bengio, Léonard, Courville 2013 ("Estimating or propagating gradients through stochastic neurons"): the rounding counts
as the identity when gradients are computed, so weights learn to do well where they will be put.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.passes.contract import Rounding

_LEVELS = 255  # of an activation, uint8


def rounded_activations(x: Tensor) -> Tensor:
    """`x` [...] as ONNX's DynamicQuantizeLinear keeps it: 256 levels from its least to its greatest value, and 0."""
    x = x.float()
    least, greatest = torch.aminmax(x.detach())
    least, greatest = least.clamp_max(0), greatest.clamp_min(0)
    scale = ((greatest - least) / _LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    zero = (-least / scale).round().clamp(0, _LEVELS).to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, _LEVELS)


def rounded_weight(weight: Tensor, axis: int, rounding: Rounding) -> Tensor:
    """`weight` [in_features, out_features], or transposed, as symmetric integers times a scale.

    Args:
        axis: of the output features.
    """
    weight = weight.float()
    size = weight.detach().abs()
    most = size.amax(1 - axis) if rounding.per_channel else size.amax().expand(weight.shape[axis])
    scale = (most / rounding.largest).clamp_min(torch.finfo(torch.float32).tiny)
    zeros = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zeros, axis, -rounding.largest, rounding.largest)
