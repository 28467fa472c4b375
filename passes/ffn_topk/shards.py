"""DA-TOP-k: each of s devices takes the best of its own part; how many those have to be for a wanted recall.

Source: HiRE (arXiv 2402.09360) for the method. Where the wanted ones fall at random, the recall follows from sampling
without replacement; where they really fall, held-out states tell.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import hypergeom


def expected_recall(n: int, k: int, shards: int, local: int) -> float:
    """Share of the k wanted of n things that are found if each shard takes its `local` best, and scores are true.

    The wanted ones fall into the shards at random: X ~ Hypergeometric(n, k, n / s) of them into each, of which it takes
    min(X, m). So the share is (s / k) · E[min(X, m)], and E[min(X, m)] = Σ_{i < m} P(X > i).

    Args:
        shards: s; divides n.
        local: m.
    """
    if n % shards:
        raise ValueError(f"{shards} shards do not divide {n}")
    more = hypergeom.sf(np.arange(min(local, k)), n, k, n // shards)
    return float(min(1.0, shards / k * more.sum()))
