"""Which score a share of all blocks lies below, where each token computes its best block in any case."""

from __future__ import annotations

import numpy as np


def cuts(scores: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Numbers that leave out `shares` of all blocks, those of lower score, [shares], float32.

    Each is the least number that is above so many scores, so that equal ones go together. The best block of a token is
    computed whatever its score, and so is none of those that are left out.

    Args:
        scores: [tokens, blocks].
        shares: above 0; those that leave less than a block of each token count as the largest that does not.
    """
    others = np.ones(scores.shape, bool)
    np.put_along_axis(others, scores.argmax(1)[:, None], False, axis=1)
    ordered = np.sort(scores[others])
    if not len(ordered):
        return np.full(len(shares), -np.inf, np.float32)
    count = np.ceil(np.asarray(shares) * scores.size - 1e-6).astype(np.int64)
    last = ordered[np.clip(count, 1, len(ordered)) - 1].astype(np.float32)
    return np.nextafter(last, np.float32(np.inf))
