"""Agreement of two models' decisions, corrected for chance: where one answer is common, most decisions agree anyway."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy.stats import norm

_TAIL = 0.025  # probability beyond the upper end of a two-sided 95 % interval


class Decisions(BaseModel):
    """How well the compiled decisions agree with the dense ones.

    Attributes:
        kappa: Cohen's kappa, agreement beyond chance: 0 for a constant answer, 1 for equal decisions.
        kappa_upper: upper end of kappa's 95 % interval.
        worst_class: the class with the smallest ratio of samples to which both models give it to samples to which
            either gives it; its name, or its number without names. None where neither model gives any class.
        worst_f1: F1 of that class, compiled against dense decisions.
        worst_f1_upper: upper end of the 95 % interval of `worst_f1`, valid for all classes together.
    """

    model_config = ConfigDict(frozen=True)

    kappa: float
    kappa_upper: float
    worst_class: str | None = None
    worst_f1: float = 1.0
    worst_f1_upper: float = 1.0

    def line(self) -> str:
        """The figures, for people."""
        worst = "" if self.worst_class is None else f"; worst class {self.worst_class}: F1 {self.worst_f1:.4f}"
        return f"corrected for chance: Cohen's kappa {self.kappa:.4f}{worst}"


def compare_decisions(dense: np.ndarray, compiled: np.ndarray, names: Sequence[str] | None = None) -> Decisions:
    """Compare classes [samples], or decisions on labels, bool [samples, labels].

    Args:
        names: names of the classes or labels; by default their numbers.
    """
    if dense.ndim == 2:
        classes, both, either = np.arange(dense.shape[1]), (dense & compiled).sum(0), (dense | compiled).sum(0)
    else:
        classes, places = np.unique(np.concatenate([dense, compiled]), return_inverse=True)
        a, b = np.split(places.reshape(-1), 2)
        both = np.bincount(a[a == b], minlength=len(classes))
        either = np.bincount(a, minlength=len(classes)) + np.bincount(b, minlength=len(classes)) - both
    kappa, upper = _kappa(dense.reshape(-1), compiled.reshape(-1))
    if not either.any():
        return Decisions(kappa=kappa, kappa_upper=upper)
    ends = _upper_share(both, np.maximum(either, 1), int(np.count_nonzero(either)))
    shares = np.where(either > 0, both / np.maximum(either, 1), 1.0)
    worst = int(np.lexsort((shares, np.where(either > 0, ends, 2.0)))[0])  # the class whose loss chance explains least
    number = int(classes[worst])
    return Decisions(
        kappa=kappa,
        kappa_upper=upper,
        worst_class=names[number] if names and number < len(names) else str(number),
        worst_f1=_f1(float(shares[worst])),
        worst_f1_upper=_f1(float(ends[worst])),
    )


def _kappa(dense: np.ndarray, compiled: np.ndarray) -> tuple[float, float]:
    """Cohen's kappa and the upper end of its interval (Cohen 1960, A coefficient of agreement for nominal scales)."""
    count = len(dense)
    classes, places = np.unique(np.concatenate([dense, compiled]), return_inverse=True)
    shares = [np.bincount(each, minlength=len(classes)) / count for each in np.split(places.reshape(-1), 2)]
    chance, same = float(shares[0] @ shares[1]), float(np.mean(dense == compiled))
    if len(classes) == 1:
        return 1.0, 1.0
    kappa = (same - chance) / (1 - chance)
    error = math.sqrt(same * (1 - same) / count) / (1 - chance)
    return kappa, min(1.0, kappa + float(norm.ppf(1 - _TAIL)) * error)


def _upper_share(part: np.ndarray, whole: np.ndarray, comparisons: int) -> np.ndarray:
    """Upper ends of Wilson's score intervals of part / whole, valid for all `comparisons` shares together."""
    z = float(norm.ppf(1 - _TAIL / comparisons))
    p = part / whole
    centre = p + z**2 / (2 * whole)
    ends: np.ndarray = (centre + z * np.sqrt(p * (1 - p) / whole + z**2 / (4 * whole**2))) / (1 + z**2 / whole)
    return ends


def _f1(share: float) -> float:
    """F1 of a class that both models give to `share` of the samples to which either gives it."""
    return 2 * share / (1 + share)
