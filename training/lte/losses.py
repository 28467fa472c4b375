"""What routers learn from besides the task: efficiency, which switches groups off, and separability."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from trimtab.training.lte.routers import THRESHOLD

_NEAREST = 0.1  # distance from the threshold below which separability grows no further: at 0 it would be infinite


def efficiency(scores: Tensor) -> Tensor:
    """Mean square of the scores of each token, [...], of scores [..., groups]."""
    return scores.square().mean(-1)


def separability(scores: Tensor) -> Tensor:
    """Mean of 1/(G - τ)² of each token, [...], of scores [..., groups]; at most 1/0.1²."""
    return (1 / (scores - THRESHOLD).abs().clamp_min(_NEAREST).square()).mean(-1)


def over_tokens(values: Iterable[Tensor], mask: Tensor | None) -> Tensor:
    """Mean over layers and real tokens.

    Args:
        values: of each layer one for each token, in any shape that flattens as `mask` does.
        mask: [batch, tokens], 0 for padding; None where there is none.
    """
    of_layers = torch.stack([each.reshape(-1).float() for each in values])
    if mask is None or mask.numel() != of_layers.shape[1]:
        return of_layers.mean()
    weight = mask.reshape(-1).to(of_layers.dtype)
    return (of_layers.mean(0) * weight).sum() / weight.sum()
