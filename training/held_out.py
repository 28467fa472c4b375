"""Which samples of a dataset are learned from, and which are held out to judge by."""

from __future__ import annotations

import numpy as np

from trimtab.compiler.data import Dataset
from trimtab.passes.errors import DataError

SHARE = 0.05
"""Of the samples that are held out: at least one, at most `MOST`."""

MOST = 512


def split(dataset: Dataset, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the samples to learn from, and of those held out, in random order.

    Raises:
        DataError: fewer than two samples.
    """
    if dataset.count < 2:
        raise DataError(f"{dataset.path}: {dataset.count} sample", hint="training needs two at the very least")
    order = rng.permutation(dataset.count)
    count = min(max(1, round(SHARE * dataset.count)), MOST)
    return order[count:], order[:count]
