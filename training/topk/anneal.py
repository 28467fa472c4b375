"""What a run of transformers' Trainer follows: the clock sets learning rate and density, and ends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trimtab.training.clock import Clock, schedule
from trimtab.training.topk.settings import Settings
from trimtab.training.topk.sparse import SparseFFNs

Progress = Callable[[str, int, int], None]


def annealed(at: float, density: float, ramp: float) -> float:
    """Density at the share `at` of a run: from 1 down to `density` within `ramp`, by equal factors, then constant."""
    done = 1.0 if ramp <= 0 else min(1.0, at / ramp)
    return float(density**done)


class Anneal(TrainerCallback):
    """Sets density and learning rate before each step, looks at the held-out samples at times, and ends the run.

    Attributes:
        history: step, density and loss of each look.
    """

    def __init__(
        self, ffns: SparseFFNs, density: float, settings: Settings, clock: Clock, progress: Progress | None
    ) -> None:
        self._ffns, self._density, self._settings, self._clock = ffns, density, settings, clock
        self._progress, self._look_at = progress, clock.every
        self.history: list[dict[str, float]] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        at = self._clock.at(state.global_step)
        self._ffns.density = annealed(at, self._density, self._settings.ramp)
        for group in given["optimizer"].param_groups:
            group["lr"] = self._settings.lr * schedule(at)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        at = self._clock.at(state.global_step)
        control.should_training_stop = at >= 1
        if at >= self._look_at and at < 1:
            control.should_evaluate = True
            self._look_at = at + self._clock.every
        if self._progress is not None and state.is_world_process_zero:
            self._progress("fine-tune", round(min(at, 1) * self._clock.total), self._clock.total)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        loss = given["metrics"]["eval_loss"]
        self.history.append({"step": state.global_step, "density": round(self._ffns.density, 4), "loss": loss})
