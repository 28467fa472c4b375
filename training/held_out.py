"""Splits a dataset into training samples and held-out samples."""

from __future__ import annotations

import numpy as np

from trimtab.compiler.data import Dataset
from trimtab.passes.errors import DataError

SHARE = 0.05
"""Share of the samples that is held out: at least one sample, at most `MAX_SAMPLES`."""

MAX_SAMPLES = 512


def split(dataset: Dataset, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training samples and of the held-out samples, in random order.

    Raises:
        DataError: fewer than two samples.
    """
    if dataset.count < 2:
        raise DataError(f"{dataset.path}: {dataset.count} sample", hint="training needs two at the very least")
    order = rng.permutation(dataset.count)
    count = min(max(1, round(SHARE * dataset.count)), MAX_SAMPLES)
    return order[count:], order[:count]
