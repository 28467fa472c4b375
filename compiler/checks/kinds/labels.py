"""Multi-label classifiers: micro-F1 and the error of each label, or without labels the share of equal decisions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy.stats import norm

from trimtab.compiler.checks.kinds.classes import difference_line
from trimtab.compiler.checks.kinds.decisions import Decisions, compare_decisions
from trimtab.compiler.checks.kinds.result import Result

_SHOWN = 5  # labels that `lines` shows: those whose decisions change most


class MultiLabel(Result):
    """Decisions of a model that gives a sample every label whose probability is over 0.5.

    Attributes:
        agreement: share of decisions, one for each sample and label, that are the same.
        decisions: the agreement corrected for chance.
        dense, compiled: micro-F1 against the data's labels; None without labels.
        difference: compiled minus dense.
        interval: 95 % confidence interval of the difference, paired.
        per_label: one row per label: the share of samples whose decision differs (`changed`), and with labels the
            number of samples that have the label (`positives`) and the shares of wrong decisions (`dense_error`,
            `compiled_error`).
    """

    kind: Literal["labels"] = "labels"
    agreement: float
    decisions: Decisions | None = None
    dense: float | None = None
    compiled: float | None = None
    difference: float | None = None
    interval: tuple[float, float] | None = None
    per_label: tuple[dict[str, Any], ...] = ()

    @property
    def measured(self) -> str:
        return "agreement" if self.compiled is None else "micro-F1"

    @property
    def score(self) -> float:
        return self.agreement if self.compiled is None else self.compiled

    @property
    def drop(self) -> float | None:
        return None if self.difference is None else -100 * self.difference

    def lines(self) -> list[str]:
        lines = []
        if self.dense is not None and self.difference is not None and self.interval is not None:
            lines.append(f"micro-F1 on {self.samples} samples: dense {self.dense:.4f}, compiled {self.compiled:.4f}")
            lines.append(difference_line(self.difference, self.interval))
        lines.append(f"same decision for {self.agreement:.2%} of all labels of {self.samples} samples")
        if self.decisions is not None:
            lines.append(self.decisions.line())
        changed = sorted((row for row in self.per_label if row["changed"]), key=lambda row: -row["changed"])
        for row in changed[:_SHOWN]:
            error = ""
            if "dense_error" in row:
                error = f", wrong for {row['dense_error']:.2%} (dense) and {row['compiled_error']:.2%} (compiled)"
            lines.append(f"  {row['label']}: changed for {row['changed']:.2%}{error}")
        return lines


def compare_labels(
    dense: np.ndarray, compiled: np.ndarray, labels: np.ndarray | None = None, names: Sequence[str] | None = None
) -> MultiLabel:
    """Compare decisions, bool [samples, labels] each.

    Micro-F1 is 2 TP / (2 TP + FP + FN) over all decisions; 1 where no sample has a label and the model gives none. The
    interval uses the delta method: F1 is a ratio of means over samples, and the interval takes its linear part.

    Args:
        labels: the true labels, bool [samples, labels].
        names: names of the labels; by default their numbers.
    """
    samples = len(dense)
    rows = [
        {"label": names[i] if names and i < len(names) else str(i), "changed": float(share)}
        for i, share in enumerate(np.mean(dense != compiled, axis=0))
    ]
    comparison = MultiLabel(
        samples=samples,
        agreement=float(np.mean(dense == compiled)),
        decisions=compare_decisions(dense, compiled, names),
        per_label=tuple(rows),
    )
    if labels is None:
        return comparison
    errors = [np.mean(each != labels, axis=0) for each in (dense, compiled)]
    for i, row in enumerate(rows):
        row |= {
            "positives": int(labels[:, i].sum()),
            "dense_error": float(errors[0][i]),
            "compiled_error": float(errors[1][i]),
        }
    (theirs, their_parts), (ours, our_parts) = (_micro_f1(each, labels) for each in (dense, compiled))
    half = float(norm.ppf(0.975)) * math.sqrt(float(np.sum((our_parts - their_parts) ** 2))) / samples
    difference = ours - theirs
    return comparison.model_copy(
        update={
            "dense": theirs,
            "compiled": ours,
            "difference": difference,
            "interval": (difference - half, difference + half),
            "per_label": tuple(rows),
        }
    )


def _micro_f1(decided: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Micro-F1, and the linear contribution of each sample to its error, [samples]."""
    both = 2.0 * np.sum(decided & labels, axis=1)
    either = np.sum(decided, axis=1) + np.sum(labels, axis=1)
    if not either.any():
        return 1.0, np.zeros(len(labels))
    f1 = float(both.sum() / either.sum())
    return f1, (both - f1 * either) / either.mean()
