"""Sizes of the activations of an FFN's blocks of neurons, and their quantiles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trimtab.passes.ffn_topk.importance import norms, pool
from trimtab.passes.sampled_ffn import SampledFFN
from trimtab.passes.sparse_ffn.shares import cuts

STEPS = 100
"""Number of equal steps from share 0 to 1 whose thresholds are stored; others are interpolated."""

_LEAST = 1e-6  # relative to the largest size: smaller sizes count as 0, since float32 sums cannot resolve them


@dataclass(frozen=True)
class Sizes:
    """Sizes of the blocks of one FFN: Σ w_j |a_j| over the neurons of each.

    a = act(x W_gate), or act(x W_up) without a gate.

    Attributes:
        weight: w, [d_ff], float32; None if all weights are 1.
        block: number of neighbouring neurons in a block.
    """

    weight: np.ndarray | None
    block: int

    def of(self, activations: np.ndarray) -> np.ndarray:
        """Sizes of the activations a [tokens, d_ff], [tokens, blocks]."""
        sizes = np.abs(activations)
        if self.weight is not None:
            sizes *= self.weight
        return pool(sizes, self.block)


def first_activations(layer: SampledFFN, x: np.ndarray) -> np.ndarray:
    """a = act(x W_gate), or act(x W_up) without a gate, [n, d_ff], for states x [n, d_model]."""
    w, bias = layer.ups[0], layer.up_biases[0]
    y = x @ w if bias is None else x @ w + bias
    return layer.act((y, np.ones_like(y)) if layer.ffn.gated else (y,))


def contributions(layer: SampledFFN) -> np.ndarray:
    """Average size that one unit of a neuron's activation a_j adds to the output, [d_ff].

    This is ‖v_j‖ with v_j the neuron's row of W_down. In a gated FFN it is multiplied by the root mean square of the
    factor of a_j.
    """
    weight = norms(layer)
    if not layer.ffn.gated:
        return weight
    up, bias = layer.ups[1], layer.up_biases[1]
    y = layer.fit @ up if bias is None else layer.fit @ up + bias
    return weight * np.sqrt(np.square(y).mean(0))


def thresholds(sizes: np.ndarray) -> np.ndarray:
    """Thresholds that leave out the shares 0, 1 / STEPS, ... 1 of all blocks, [STEPS + 1], float32.

    They are computed by `cuts`, so equal sizes, such as ReLU's zeros, are left out together. The first threshold is 0:
    no size is below it.

    Args:
        sizes: [tokens, blocks].
    """
    least = _LEAST * float(sizes.max()) or 1.0
    above = cuts(sizes, np.arange(1, STEPS + 1) / STEPS)
    return np.concatenate([[0.0], np.maximum(above, least)]).astype(np.float32)


def threshold_at(table: np.ndarray, share: float) -> float:
    """The threshold of a share, interpolated in the table of `thresholds` as in the graph."""
    return float(np.interp(share, np.arange(STEPS + 1) / STEPS, table))


def chosen(sizes: np.ndarray, threshold: float, limit: int) -> np.ndarray:
    """Which blocks are computed, bool [tokens, blocks]: the best one and those from the threshold on, up to `limit`."""
    best = np.arange(sizes.shape[1]) == sizes.argmax(1)[:, None]
    computed = (sizes >= threshold) | best
    if limit < sizes.shape[1]:
        last = -np.partition(-sizes, limit - 1, axis=1)[:, limit - 1 : limit]
        computed &= sizes >= last
    return computed
