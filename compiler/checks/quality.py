"""How well a compiled model does its task beside its dense self: accuracy, embeddings, or agreement."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy.stats import norm, rankdata

from trimtab.compiler.checks.perplexity import Perplexity
from trimtab.compiler.feeds import Run
from trimtab.passes.errors import DataError, ModelError

_NEIGHBOURS = 10
_RANKED = 2000  # samples whose neighbours are compared, all against all


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True)


class Classification(_Result):
    """Accuracy on labelled samples; all shares lie in 0..1.

    Attributes:
        difference: compiled minus dense accuracy.
        interval: its 95 % confidence interval, paired, since both classify the same samples.
        agreement: share of samples to which both give the same class.
    """

    kind: Literal["classification"] = "classification"
    samples: int
    dense: float
    compiled: float
    difference: float
    interval: tuple[float, float]
    agreement: float

    @property
    def score(self) -> float:
        return self.compiled


class Embeddings(_Result):
    """How near compiled embeddings lie to dense ones, and whether the same texts stay neighbours.

    Attributes:
        mean_cosine: between the two embeddings of a sample.
        neighbour_overlap: mean share of a sample's 10 nearest neighbours that are the same.
        spearman: mean rank correlation of a sample's similarities to all others.
    """

    kind: Literal["embeddings"] = "embeddings"
    samples: int
    mean_cosine: float
    neighbour_overlap: float
    spearman: float

    @property
    def score(self) -> float:
        return self.mean_cosine


class Agreement(_Result):
    """Without labels, or for a model that predicts tokens: the share of predictions that are the same."""

    kind: Literal["agreement"] = "agreement"
    samples: int
    agreement: float

    @property
    def score(self) -> float:
        return self.agreement


Quality = Classification | Embeddings | Agreement | Perplexity
"""`score` is what a limit on quality is held against: accuracy, mean cosine, agreement, or a ratio of perplexities."""


def measure_quality(
    feeds: Iterable[Mapping[str, np.ndarray]], dense: Run, compiled: Run, labels: Sequence[int | None] | None = None
) -> Quality:
    """Run both models over `feeds` and compare what they predict. Keeps predictions, not outputs.

    Args:
        feeds: batches of inputs; `attention_mask` tells padding.
        labels: one class per sample, in the order of `feeds`.

    Raises:
        DataError: no samples, or labels that the model does not have.
        ModelError: no output that can be judged.
    """
    kind, dense_parts, compiled_parts = "", [], []
    for feed in feeds:
        mask = feed.get("attention_mask")
        kind, part = _prediction(dense(feed), mask)
        dense_parts.append(part)
        compiled_parts.append(_prediction(compiled(feed), mask)[1])
    if not dense_parts:
        raise DataError("the data holds no samples to measure quality on")
    ours, theirs = np.concatenate(compiled_parts), np.concatenate(dense_parts)
    if kind == "embeddings":
        return compare_embeddings(theirs, ours)
    if kind == "classes":
        classes = theirs.shape[1]
        theirs, ours = theirs.argmax(1), ours.argmax(1)
        known = None if labels is None else [label for label in labels[: len(theirs)] if label is not None]
        if known is not None and len(known) == len(theirs):
            if not all(0 <= label < classes for label in known):
                raise DataError(f"a label lies outside 0..{classes - 1}, the classes of the model")
            return compare_classes(theirs, ours, np.array(known))
    return Agreement(samples=len(theirs), agreement=float(np.mean(theirs == ours)))


def _prediction(outputs: Mapping[str, np.ndarray], mask: np.ndarray | None) -> tuple[str, np.ndarray]:
    """What of `outputs` is judged: logits [samples, classes], embeddings [samples, width], or ids of real tokens."""
    if "logits" in outputs:
        logits = outputs["logits"]
        if logits.ndim == 2:
            return "classes", logits
        best = logits.argmax(-1)
        return "tokens", best.reshape(-1) if mask is None else best[mask != 0]
    if "sentence_embedding" in outputs:
        return "embeddings", outputs["sentence_embedding"]
    if "last_hidden_state" in outputs:
        return "embeddings", mean_pool(outputs["last_hidden_state"], mask)
    raise ModelError(
        f"quality cannot be judged by the outputs {', '.join(outputs)}",
        hint="name an output logits, last_hidden_state or sentence_embedding",
    )


def mean_pool(hidden: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The mean of `hidden` [samples, tokens, width] over the tokens where `mask` [samples, tokens] is not 0."""
    if mask is None:
        return hidden.mean(1)
    weight = (mask != 0)[..., None].astype(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


def compare_classes(dense: np.ndarray, compiled: np.ndarray, labels: np.ndarray) -> Classification:
    """Accuracy of two lists of predicted classes, and the paired difference.

    The interval is Wald's with 0.5 added to each cell of the 2 × 2 table, which keeps its coverage where few samples
    differ (Agresti & Min 2005, Simple improved confidence intervals for comparing matched proportions).
    """
    samples = len(labels)
    dense_right, compiled_right = dense == labels, compiled == labels
    gained = np.sum(compiled_right & ~dense_right) + 0.5
    lost = np.sum(dense_right & ~compiled_right) + 0.5
    centre = (gained - lost) / (samples + 2)
    spread = math.sqrt(gained + lost - (gained - lost) ** 2 / (samples + 2)) / (samples + 2)
    half = float(norm.ppf(0.975)) * spread
    return Classification(
        samples=samples,
        dense=dense_right.mean(),
        compiled=compiled_right.mean(),
        difference=compiled_right.mean() - dense_right.mean(),
        interval=(centre - half, centre + half),
        agreement=np.mean(dense == compiled),
    )


def compare_embeddings(dense: np.ndarray, compiled: np.ndarray) -> Embeddings:
    """Compare two lists of embeddings, [samples, width] each. Neighbours are by cosine, among the first 2000 samples.

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
    """Cosines of each row with every other, [n, n - 1]: the diagonal, a row with itself, is taken out."""
    n = len(rows)
    return (rows @ rows.T)[~np.eye(n, dtype=bool)].reshape(n, n - 1)


def _top(rows: np.ndarray, count: int) -> np.ndarray:
    return np.argpartition(-rows, count - 1, axis=1)[:, :count]


def _row_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each row of `a` with that of `b`; 1 where both rows are constant alike."""
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    product = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.where(product > 0, (a * b).sum(1) / np.where(product > 0, product, 1), (a == b).all(1))
