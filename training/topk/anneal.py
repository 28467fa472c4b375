"""Density schedule of a run: the density falls as the clock advances, like the learning rate."""

from __future__ import annotations

from typing import Any

from trimtab.compiler.progress import Progress
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
        density: density at the end.
        ramp: share of the run over which the density falls.
    """

    def __init__(self, ffns: SparseFFNs, density: float, ramp: float, clock: Clock, progress: Progress | None) -> None:
        super().__init__("fine-tune", clock, progress)
        self._ffns, self._density, self._ramp = ffns, density, ramp

    def begin_step(self, at: float) -> None:
        self._ffns.density = annealed(at, self._density, self._ramp)

    def row(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        return {"step": step, "density": round(self._ffns.density, 4), "loss": metrics["eval_loss"]}
