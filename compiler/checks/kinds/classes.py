"""Classifiers: accuracy, or without labels the share of samples for which both models predict the same class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.stats import norm

from trimtab.compiler.checks.kinds.decisions import Decisions, compare_decisions
from trimtab.compiler.checks.kinds.result import Result


class Classification(Result):
    """Accuracy on labelled samples; all shares are between 0 and 1.

    Attributes:
        difference: compiled minus dense accuracy.
        interval: 95 % confidence interval of the difference, paired, since both models classify the same samples.
        agreement: share of samples to which both models give the same class.
        decisions: the agreement corrected for chance.
    """

    kind: Literal["classification"] = "classification"
    dense: float
    compiled: float
    difference: float
    interval: tuple[float, float]
    agreement: float
    decisions: Decisions | None = None

    @property
    def measured(self) -> str:
        return "accuracy"

    @property
    def score(self) -> float:
        return self.compiled

    @property
    def drop(self) -> float:
        return -100 * self.difference

    def lines(self) -> list[str]:
        return [
            f"accuracy on {self.samples} samples: dense {self.dense:.2%}, compiled {self.compiled:.2%}",
            difference_line(self.difference, self.interval),
            f"same class for {self.agreement:.2%} of the samples",
            *([self.decisions.line()] if self.decisions else []),
        ]


class Agreement(Result):
    """Without labels, or for a model that predicts tokens: the share of predictions that are the same."""

    kind: Literal["agreement"] = "agreement"
    agreement: float
    decisions: Decisions | None = None

    @property
    def measured(self) -> str:
        return "agreement"

    @property
    def score(self) -> float:
        return self.agreement

    def lines(self) -> list[str]:
        corrected = [self.decisions.line()] if self.decisions else []
        return [f"same prediction for {self.agreement:.2%} of {self.samples}", *corrected]


def difference_line(difference: float, interval: tuple[float, float]) -> str:
    """The line for a difference of shares and its interval, in points."""
    low, high = (100 * bound for bound in interval)
    return f"difference {100 * difference:+.2f} points (95 % interval {low:+.2f} to {high:+.2f})"


def compare_predictions(dense: np.ndarray, compiled: np.ndarray, names: Sequence[str] | None = None) -> Agreement:
    """Compare two lists of predicted classes without labels; `names` are the class names."""
    return Agreement(
        samples=len(dense),
        agreement=float(np.mean(dense == compiled)),
        decisions=compare_decisions(dense, compiled, names),
    )


def compare_classes(
    dense: np.ndarray, compiled: np.ndarray, labels: np.ndarray, names: Sequence[str] | None = None
) -> Classification:
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
        decisions=compare_decisions(dense, compiled, names),
    )
