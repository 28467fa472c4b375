"""The scores that order the neurons of an FFN: a neuron with a high score is a heavy hitter."""

from __future__ import annotations

from typing import Literal

import numpy as np

from trimtab.passes.matrices.regress import Moments
from trimtab.passes.sampled_ffn import SampledFFN

Score = Literal["contribution", "activation", "energy", "deviation", "residual"]


def score(layer: SampledFFN, kind: Score) -> np.ndarray:
    """The score of each neuron, [d_ff]; larger is heavier.

    With h_j the activation of neuron j over the calibration tokens and v_j its row of W_down:

    - contribution: Σ |h_j| ‖v_j‖, the size of the neuron's part of the output (FFSplit, arXiv 2401.04044, §3).
    - activation: Σ |h_j|, without the output weights.
    - energy: (Σ h_j²)^½ ‖v_j‖.
    - deviation: (Σ (h_j − h̄_j)²)^½ ‖v_j‖, the part that remains after the mean is folded into the bias.
    - residual: deviation of h_j minus its best linear prediction from x, the part that neither a bias nor an affine map
      can replace.
    """
    stats = layer.stats
    norm = np.linalg.norm(layer.down * layer.gain, axis=1)
    if kind == "activation":
        return stats.abs_sum
    if kind == "contribution":
        return stats.abs_sum * norm
    if kind == "energy":
        return np.sqrt(stats.square_sum) * norm
    if kind == "deviation":
        return np.sqrt(np.maximum(stats.square_sum - stats.sum**2 / stats.tokens, 0)) * norm
    moments = Moments.of((layer.fit,), layer.h_fit)
    explained = np.einsum("ij,ij->j", moments.solve(), moments.cross)
    h = layer.h_fit
    spread = np.einsum("ij,ij->j", h, h, dtype=np.float64) / len(h) - h.mean(0, dtype=np.float64) ** 2
    return np.sqrt(np.maximum(spread - explained, 0)) * norm
