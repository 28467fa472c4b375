"""Rerankers and regressions: rank correlation with the dense scores; with labels, rank correlation or NDCG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.stats import norm, rankdata

from trimtab.compiler.checks.kinds.classes import difference_line
from trimtab.compiler.checks.kinds.result import Result
from trimtab.passes.errors import DataError

_RANKS = 10  # the 10 of NDCG@10


class Scores(Result):
    """How near compiled scores are to dense ones, and how both rank against labels.

    Attributes:
        spearman, pearson: correlation of compiled and dense scores; where a sample has several scores, their mean.
        mean_error: mean |compiled - dense| of the scores as they are served.
        relative_error: mean error, divided by the standard deviation of the dense scores; where a sample has several
            scores, their mean. None where all dense scores are equal.
        dense_spearman, compiled_spearman: rank correlation with the labels; None without labels.
        queries: number of queries with at least two documents and two different labels; the pairs of a query share
            their first text.
        dense_ndcg, compiled_ndcg: mean NDCG@10 of those queries; None where there are none.
        difference: compiled minus dense NDCG@10 where there are queries, else compiled minus dense rank correlation
            with the labels.
        interval: 95 % confidence interval of the difference of NDCG@10, paired by query.
    """

    kind: Literal["scores"] = "scores"
    spearman: float
    pearson: float
    mean_error: float
    relative_error: float | None = None
    dense_spearman: float | None = None
    compiled_spearman: float | None = None
    queries: int = 0
    dense_ndcg: float | None = None
    compiled_ndcg: float | None = None
    difference: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def measured(self) -> str:
        return next(
            name
            for name, value in (
                ("NDCG@10", self.compiled_ndcg),
                ("rank correlation with the labels", self.compiled_spearman),
                ("rank correlation with the dense scores", self.spearman),
            )
            if value is not None
        )

    @property
    def score(self) -> float:
        return next(x for x in (self.compiled_ndcg, self.compiled_spearman, self.spearman) if x is not None)

    @property
    def drop(self) -> float | None:
        return None if self.difference is None else -100 * self.difference

    def lines(self) -> list[str]:
        lines = [
            f"scores of {self.samples} samples against dense ones: rank correlation {self.spearman:.4f}, "
            f"correlation {self.pearson:.4f}, mean error {self.mean_error:.4g}"
        ]
        if self.dense_ndcg is not None and self.interval is not None and self.difference is not None:
            lines.append(
                f"NDCG@10 of {self.queries} queries: dense {self.dense_ndcg:.4f}, compiled {self.compiled_ndcg:.4f}"
            )
            lines.append(difference_line(self.difference, self.interval))
        if self.dense_spearman is not None:
            lines.append(
                f"rank correlation with the labels: dense {self.dense_spearman:.4f}, "
                f"compiled {self.compiled_spearman:.4f}"
            )
        return lines


def compare_scores(
    dense: np.ndarray,
    compiled: np.ndarray,
    labels: np.ndarray | None = None,
    queries: Sequence[int] | None = None,
    *,
    ranks_of: tuple[np.ndarray, np.ndarray] | None = None,
) -> Scores:
    """Compare scores, [samples, width] each.

    Args:
        labels: [samples, width].
        queries: the query number of each sample. NDCG needs it, labels that are not negative, and a width of 1.
        ranks_of: dense and compiled values that rank as the scores do; by default the scores. Logits serve here: a
            sigmoid rounds large logits to the same score.

    Raises:
        DataError: fewer than three samples, or labels that are all the same.
    """
    if len(dense) < 3:
        raise DataError(f"{len(dense)} samples are too few to compare their ranks", hint="give at least three")
    theirs, ours = (np.asarray(each, np.float64) for each in ranks_of or (dense, compiled))
    dense, compiled = np.asarray(dense, np.float64), np.asarray(compiled, np.float64)
    result = Scores(
        samples=len(dense),
        spearman=_spearman(theirs, ours),
        pearson=_correlation(dense, compiled),
        mean_error=float(np.mean(np.abs(compiled - dense))),
        relative_error=_relative_error(dense, compiled),
    )
    if labels is None:
        return result
    if np.all(labels == labels[0]):
        raise DataError(
            f"all {len(labels)} labels are {labels[0].tolist()}, so there is nothing to rank",
            hint="give samples of different labels, or leave the labels out",
        )
    ranked = _spearman(labels, theirs), _spearman(labels, ours)
    update: dict[str, object] = {
        "dense_spearman": ranked[0],
        "compiled_spearman": ranked[1],
        "difference": ranked[1] - ranked[0],
    }
    if queries is not None and labels.shape[1] == 1 and labels.min() >= 0:
        gains = _per_query(labels[:, 0], theirs[:, 0], ours[:, 0], np.asarray(queries))
        if len(gains):
            update |= _ndcg_fields(gains)
    return result.model_copy(update=update)


def _relative_error(dense: np.ndarray, compiled: np.ndarray) -> float | None:
    spread = dense.std(0)
    if not (spread > 0).all():
        return None
    return float(np.mean(np.abs(compiled - dense).mean(0) / spread))


def _per_query(labels: np.ndarray, dense: np.ndarray, compiled: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """NDCG@10 of both models for each query in which labels differ, [queries, 2]."""
    order = np.argsort(queries, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(queries[order])) + 1)
    per_query = [[ndcg(labels[g], scores[g]) for scores in (dense, compiled)] for g in groups if np.ptp(labels[g]) > 0]
    return np.array(per_query).reshape(-1, 2)


def _ndcg_fields(gains: np.ndarray) -> dict[str, object]:
    differences = gains[:, 1] - gains[:, 0]
    count = len(differences)
    spread = float(differences.std(ddof=1)) / math.sqrt(count) if count > 1 else 1.0  # one query gives no spread
    half, difference = float(norm.ppf(0.975)) * spread, float(differences.mean())
    return {
        "queries": len(gains),
        "dense_ndcg": float(gains[:, 0].mean()),
        "compiled_ndcg": float(gains[:, 1].mean()),
        "difference": difference,
        "interval": (difference - half, difference + half),
    }


def ndcg(labels: np.ndarray, scores: np.ndarray, ranks: int = _RANKS) -> float:
    """NDCG@`ranks` of one query's documents: DCG in the order of `scores`, divided by DCG in the order of the labels.

    DCG = Σᵢ labelᵢ / log₂(i + 1) over the first ranks i (Järvelin & Kekäläinen 2002, Cumulated gain-based evaluation of
    IR techniques; gains are the labels, as trec_eval and BEIR have them). Documents of equal score share the ranks they
    take: each counts with its group's mean label (McSherry & Najork 2008, Computing information retrieval performance
    measures efficiently in the presence of tied scores), so that a model of equal scores gains nothing by chance.

    Args:
        labels: [documents], none negative, at least one positive.
        scores: [documents].
    """
    discounts = np.zeros(len(labels))
    discounts[:ranks] = 1 / np.log2(np.arange(2, min(ranks, len(labels)) + 2))
    _, groups, counts = np.unique(-np.asarray(scores, np.float64), return_inverse=True, return_counts=True)
    means = np.bincount(groups, labels) / counts
    ends = np.cumsum(counts)
    sums = np.concatenate([[0], np.cumsum(discounts)])
    gained = float(means @ (sums[ends] - sums[ends - counts]))
    return gained / float(np.sort(labels)[::-1] @ discounts)


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    return _correlation(rankdata(a, axis=0), rankdata(b, axis=0))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Mean of Pearson's correlations of the columns. Where a column is constant: 1 if both are equal, else 0."""
    x, y = a - a.mean(0), b - b.mean(0)
    product = np.sqrt((x**2).sum(0) * (y**2).sum(0))
    same = np.all(a == b, axis=0).astype(np.float64)
    return float(np.where(product > 0, (x * y).sum(0) / np.where(product > 0, product, 1), same).mean())
