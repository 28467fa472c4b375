"""Density over a run: it falls as the clock goes, and the learning rate with it."""

from __future__ import annotations

from collections.abc import Mapping

from trimtab.compiler.phases import Progress
from trimtab.training.clock import Clock
from trimtab.training.huggingface import Follow
from trimtab.training.topk.sparse import SparseFFNs


def annealed(at: float, density: float, ramp: float) -> float:
    """Density at the share `at` of a run: from 1 down to `density` within `ramp`, by equal factors, then constant."""
    done = 1.0 if ramp <= 0 else min(1.0, at / ramp)
    return float(density**done)


class Anneal(Follow):
    """Sets the density before each step.

    Args:
        density: at the end.
        ramp: share of the run over which it falls.

    Attributes:
        history: step, density and loss of each look at the held-out samples.
    """

    def __init__(self, ffns: SparseFFNs, density: float, ramp: float, clock: Clock, progress: Progress | None) -> None:
        super().__init__("fine-tune", clock, progress)
        self._ffns, self._density, self._ramp = ffns, density, ramp
        self.history: list[dict[str, float]] = []

    def begin_step(self, at: float) -> None:
        self._ffns.density = annealed(at, self._density, self._ramp)

    def looked(self, step: int, metrics: Mapping[str, float]) -> None:
        self.history.append({"step": step, "density": round(self._ffns.density, 4), "loss": metrics["eval_loss"]})
