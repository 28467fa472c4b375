"""Steers a training to the requested sparsity: by the weight of the efficiency loss, at the end by the threshold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from trimtab.training.lte.routers import Select, choose

TOLERANCE = 0.02
"""Tolerance of the requested sparsity."""

_FALLS = 0.6  # share of the stage within which the density falls to its target
_GAIN, _DAMPING = 100.0, 20.0  # factors of log η, for the integral of the error over the stage and for the error
_LOWEST, _HIGHEST = 1e-4, 1e4  # η
_CLOSE = 0.0025  # error of the density at which a threshold is good enough
_TRIES, _HALVINGS = 4, 30


class Controller:
    """Adapts η, the weight of the efficiency loss, so that the density falls linearly to its target.

    Args:
        density: target share of computed neurons.
        eta: initial η.

    Attributes:
        eta: η of the next step.
    """

    def __init__(self, density: float, eta: float) -> None:
        self.density, self.eta = density, eta
        self._first: float | None = None  # density at the beginning
        self._log, self._at = math.log(eta), 0.0

    def target(self, at: float) -> float:
        """Density at the share `at` of the stage."""
        first = 1.0 if self._first is None else self._first
        return first + min(1.0, at / _FALLS) * (self.density - first)

    def step(self, at: float, density: float) -> float:
        """η for the next step.

        Args:
            at: share of the stage that is over.
            density: density of the previous step.
        """
        if self._first is None:
            self._first = density
        error = density - self.target(at)
        self._log += _GAIN * max(0.0, at - self._at) * error
        self._log = min(max(self._log, math.log(_LOWEST)), math.log(_HIGHEST))
        self._at = at
        self.eta = min(max(math.exp(self._log + _DAMPING * error), _LOWEST), _HIGHEST)
        return self.eta

    def state(self) -> dict[str, float | None]:
        """The state that a checkpoint stores."""
        return {"first": self._first, "log": self._log, "at": self._at, "eta": self.eta}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a checkpoint."""
        self._first, self._log, self._at, self.eta = (state[key] for key in ("first", "log", "at", "eta"))


def density_of(logits: Iterable[Tensor], select: Select, cut: float) -> float:
    """Share of the groups that are chosen, of logits [tokens, groups] of each FFN."""
    chosen, count = 0, 0
    for each in logits:
        if select == "threshold":  # as `choose`, without a mask of the best
            over = each >= cut
            chosen += int(over.sum()) + int((~over.any(-1)).sum())
        else:
            chosen += int(choose(each, select, cut).sum())
        count += each.numel()
    return chosen / count


def fit_cut(logits: Sequence[Tensor], select: Select, density: float) -> float:
    """The `cut` of `choose` at which the share `density` of all groups is chosen, as nearly as scores allow.

    Args:
        logits: [tokens, groups] of each FFN.
    """
    if select == "threshold":
        low = min(float(each.amin()) for each in logits) - 1.0
        high = max(float(each.amax()) for each in logits) + 1.0
    else:
        low, high = 0.0, 1.0
    falls = select == "threshold"  # a higher threshold chooses fewer, a higher share more
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if (density_of(logits, select, middle) > density) == falls:
            low = middle
        else:
            high = middle
    return min((low, high), key=lambda cut: abs(density_of(logits, select, cut) - density))


def trim(
    cut: Tensor, select: Select, density: float, forward: Callable[[], Sequence[Tensor]], *, again: int = _TRIES
) -> float:
    """Move `cut`, in place, until the share `density` of all groups is chosen.

    Later layers read what earlier ones leave of the stream, so a cut that fits the scores moves them.

    Args:
        forward: runs the model on some texts, and returns the logits [tokens, groups] of each FFN.
        again: how often the model may run.

    Returns:
        the density that is reached.
    """
    reached = []
    for _ in range(again):
        logits = forward()
        now = float(cut)
        current = density_of(logits, select, now)
        reached.append((abs(current - density), now, current))
        if reached[-1][0] <= _CLOSE:
            break
        cut.fill_(fit_cut(logits, select, density))
    _, best, at = min(reached)
    cut.fill_(best)
    return at
