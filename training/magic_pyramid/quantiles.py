"""Thresholds without training: quantiles of the attention that tokens receive, layer by layer, on training texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.optimize import brentq

if TYPE_CHECKING:
    from trimtab.training.magic_pyramid.pyramid import Pyramid

Feeds = dict[str, Any]


def shares(keep: float, layers: int) -> np.ndarray:
    """Share of tokens that stays after each layer. Each layer removes the same share, and the mean of all is `keep`."""
    numbers = np.arange(1, layers + 1)
    ratio = brentq(lambda r: float(np.mean(r**numbers)) - keep, 0.0, 1.0)
    return np.asarray(ratio**numbers)


def fit_thresholds(pyramid: Pyramid, batches: Callable[[], Iterable[Feeds]], keep: float) -> None:
    """Set the thresholds of `pyramid`, in place, so that the share `keep` of tokens stays, over all layers.

    A layer's threshold is fitted with the earlier thresholds applied, since importance depends on the other tokens.

    Args:
        batches: arguments of `Pyramid.forward`, the same at each call.
        keep: over 0, under 1.
    """
    pruning, was = pyramid.pruning, pyramid.training
    pyramid.eval()
    pruning.mode = "hard"
    thresholds = torch.zeros(pyramid.layers, dtype=torch.float64)
    for layer, share in enumerate(shares(keep, pyramid.layers)):
        importances, tokens = [], 0
        pruning.set_thresholds(thresholds)
        for feeds in batches():
            with torch.no_grad():
                pyramid(**feeds)
            importances.append(pruning.importances[layer].double().cpu())
            tokens += int(feeds["attention_mask"].sum())
        entered = torch.cat(importances)
        stays = min(1.0, float(share) * tokens / len(entered))
        thresholds[layer] = entered.quantile(1 - stays)
    pruning.set_thresholds(thresholds)
    pyramid.train(was)
