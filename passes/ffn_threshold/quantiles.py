"""How large the activations of an FFN's blocks of neurons are, and below which size a share of them lies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trimtab.passes.ffn_topk.importance import norms, pool
from trimtab.passes.sampled_ffn import SampledFFN
from trimtab.passes.sparse_ffn.shares import cuts

STEPS = 100
"""Shares, in equal steps from 0 to 1, whose thresholds are kept; between two, thresholds go in a straight line."""

_LEAST = 1e-6  # of the largest size: what is smaller counts as 0, since float32 has to tell it from 0 in sums


@dataclass(frozen=True)
class Sizes:
    """Sizes of the blocks of one FFN: Σ w_j |a_j| over the neurons of each.

    a = act(x W_gate), or act(x W_up) where there is no gate.

    Attributes:
        weight: w, [d_ff], float32; None where all are 1.
        block: neighbouring neurons of a block.
    """

    weight: np.ndarray | None
    block: int

    def of(self, activations: np.ndarray) -> np.ndarray:
        """[tokens, blocks], of activations a [tokens, d_ff]."""
        sizes = np.abs(activations)
        if self.weight is not None:
            sizes *= self.weight
        return pool(sizes, self.block)


def first_activations(layer: SampledFFN, x: np.ndarray) -> np.ndarray:
    """a = act(x W_gate), or act(x W_up) of FFNs without a gate, [n, d_ff], of states x [n, d_model]."""
    w, bias = layer.ups[0], layer.up_biases[0]
    y = x @ w if bias is None else x @ w + bias
    return layer.act((y, np.ones_like(y)) if layer.ffn.gated else (y,))


def contributions(layer: SampledFFN) -> np.ndarray:
    """What one unit of a neuron's activation a_j adds to the output, on average, [d_ff].

    ‖v_j‖, its row of W_down; of gated FFNs times the root mean square of what a_j is multiplied with.
    """
    weight = norms(layer)
    if not layer.ffn.gated:
        return weight
    up, bias = layer.ups[1], layer.up_biases[1]
    y = layer.fit @ up if bias is None else layer.fit @ up + bias
    return weight * np.sqrt(np.square(y).mean(0))


def thresholds(sizes: np.ndarray) -> np.ndarray:
    """Thresholds at which the shares 0, 1 / STEPS, ... 1 of all blocks are left out, [STEPS + 1], float32.

    As `cuts` has them, so that zeros of ReLU go together. The first is 0: no size is below it.

    Args:
        sizes: [tokens, blocks].
    """
    least = _LEAST * float(sizes.max()) or 1.0
    above = cuts(sizes, np.arange(1, STEPS + 1) / STEPS)
    return np.concatenate([[0.0], np.maximum(above, least)]).astype(np.float32)


def threshold_at(found: np.ndarray, share: float) -> float:
    """The threshold of a share, between those of `thresholds`, as the graph computes it."""
    return float(np.interp(share, np.arange(STEPS + 1) / STEPS, found))


def chosen(sizes: np.ndarray, threshold: float, most: int) -> np.ndarray:
    """Which blocks are computed, bool [tokens, blocks]: at most `most`, those not below the threshold, and the best."""
    best = np.arange(sizes.shape[1]) == sizes.argmax(1)[:, None]
    found = (sizes >= threshold) | best
    if most < sizes.shape[1]:
        last = -np.partition(-sizes, most - 1, axis=1)[:, most - 1 : most]
        found &= sizes >= last
    return found
