"""Batches of one epoch: each sample once, in random order, together with samples of similar length."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_POOL = 32  # number of batches sorted by length together: little padding, and a new mix in each epoch


def epoch(lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Indices of the samples of each batch. The last, smaller batch of a pool is used too.

    Args:
        lengths: lengths of the samples.
    """
    order, pool = rng.permutation(len(lengths)), batch_size * _POOL
    for start in range(0, len(order), pool):
        taken = order[start : start + pool]
        by_length = taken[np.argsort(lengths[taken], kind="stable")]
        batches = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
        for i in rng.permutation(len(batches)):
            yield batches[i]
