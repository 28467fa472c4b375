"""DA-TOP-k: each of s devices takes the best candidates of its own part.

Source: HiRE (arXiv 2402.09360). If the wanted candidates are spread over the parts at random, the recall follows from
sampling without replacement. The real recall is measured on held-out states.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import hypergeom


def expected_recall(n: int, k: int, shards: int, local: int) -> float:
    """Expected share of the k wanted among n candidates if each shard takes its `local` best, with exact scores.

    The wanted candidates are spread over the shards at random: a shard has X ~ Hypergeometric(n, k, n / s) of them and
    takes min(X, m). So the share is (s / k) · E[min(X, m)], and E[min(X, m)] = Σ_{i < m} P(X > i).

    Args:
        shards: s; divides n.
        local: m.
    """
    if n % shards:
        raise ValueError(f"{shards} shards do not divide {n}")
    more = hypergeom.sf(np.arange(min(local, k)), n, k, n // shards)
    return float(min(1.0, shards / k * more.sum()))
