"""Embeddings: cosines between compiled and dense embeddings, and whether samples keep their neighbours."""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy.stats import rankdata

from trimtab.compiler.checks.kinds.result import Result
from trimtab.passes.errors import DataError

_NEIGHBOURS = 10
_RANKED = 2000  # samples whose neighbours are compared, all against all


class Embeddings(Result):
    """How near compiled embeddings are to dense ones, and whether the same texts stay neighbours.

    Attributes:
        mean_cosine: mean cosine between the two embeddings of a sample.
        neighbour_overlap: mean share of a sample's 10 nearest neighbours that are the same.
        spearman: mean rank correlation of a sample's similarities to all others.
    """

    kind: Literal["embeddings"] = "embeddings"
    mean_cosine: float
    neighbour_overlap: float
    spearman: float

    @property
    def measured(self) -> str:
        return "mean cosine"

    @property
    def score(self) -> float:
        return self.mean_cosine

    def lines(self) -> list[str]:
        return [
            f"embeddings of {self.samples} samples: mean cosine {self.mean_cosine:.4f}",
            f"10 nearest neighbours: {self.neighbour_overlap:.2%} the same; rank correlation {self.spearman:.4f}",
        ]


def mean_pool(hidden: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The mean of `hidden` [samples, tokens, width] over the tokens where `mask` [samples, tokens] is not 0."""
    if mask is None:
        return hidden.mean(1)
    weight = (mask != 0)[..., None].astype(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


def compare_embeddings(dense: np.ndarray, compiled: np.ndarray) -> Embeddings:
    """Compare two lists of embeddings, [samples, width] each. Cosine ranks neighbours, among the first 2000 samples.

    Raises:
        DataError: fewer than three samples, which have no ranks to compare.
    """
    if len(dense) < 3:
        raise DataError(f"{len(dense)} samples are too few to compare neighbours", hint="give at least three")
    dense, compiled = _unit(dense), _unit(compiled)
    ours, theirs = _similarities(compiled[:_RANKED]), _similarities(dense[:_RANKED])
    count = min(_NEIGHBOURS, ours.shape[1])
    tops = zip(_top(ours, count), _top(theirs, count), strict=True)
    shared = [len(np.intersect1d(a, b)) / count for a, b in tops]
    ranks = [rankdata(rows, axis=1) for rows in (ours, theirs)]
    return Embeddings(
        samples=len(dense),
        mean_cosine=np.sum(dense * compiled, axis=1).mean(),
        neighbour_overlap=float(np.mean(shared)),
        spearman=_row_correlation(*ranks).mean(),
    )


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def _similarities(rows: np.ndarray) -> np.ndarray:
    """Cosines of each row with every other, [n, n - 1]: the diagonal, a row with itself, is removed."""
    n = len(rows)
    return (rows @ rows.T)[~np.eye(n, dtype=bool)].reshape(n, n - 1)


def _top(rows: np.ndarray, count: int) -> np.ndarray:
    return np.argpartition(-rows, count - 1, axis=1)[:, :count]


def _row_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each row of `a` with the same row of `b`; 1 where both rows are constant and equal."""
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    product = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.where(product > 0, (a * b).sum(1) / np.where(product > 0, product, 1), (a == b).all(1))
