"""Quantiles of blocks' scores, for selections in which each token always computes its best block."""

from __future__ import annotations

import numpy as np


def cuts(scores: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Cuts below which the given shares of all blocks have their scores, [shares], float32.

    Each cut is the smallest number above that many scores, so blocks of equal score are left out together. The best
    block of a token is always computed, so it does not count among the blocks left out.

    Args:
        scores: [tokens, blocks].
        shares: above 0. The largest effective share leaves each token one block.
    """
    others = np.ones(scores.shape, bool)
    np.put_along_axis(others, scores.argmax(1)[:, None], False, axis=1)
    ordered = np.sort(scores[others])
    if not len(ordered):
        return np.full(len(shares), -np.inf, np.float32)
    count = np.ceil(np.asarray(shares) * scores.size - 1e-6).astype(np.int64)
    last = ordered[np.clip(count, 1, len(ordered)) - 1].astype(np.float32)
    return np.nextafter(last, np.float32(np.inf))
