"""The stages of a training run, one after the other. A killed run resumes from its last checkpoint."""

from __future__ import annotations

import logging
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import EvalPrediction, Trainer, set_seed

from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.progress import Progress
from trimtab.compiler.sources.checkpoint import Checkpoint
from trimtab.training.clock import Clock
from trimtab.training.contract import Job, Settings
from trimtab.training.huggingface import Follow, is_first_process, last_checkpoint, make_trainer, require_finite
from trimtab.training.resume import Unfinished
from trimtab.training.texts import Examples

log = logging.getLogger(__name__)

Row = dict[str, Any]


class Stages(ABC):
    """The stages of one run.

    Args:
        model: the model to train; its state passes from stage to stage.
        settings: settings of the method.
        shares: stage → its share of the run, for stages that run; the shares add up to 1.
        run: the state of the unfinished run, and its folder for checkpoints.
    """

    method: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    """All stages, in the order they run."""
    shown: ClassVar[Mapping[str, str]]
    """Stage → its name in progress messages."""

    def __init__(
        self, model: nn.Module, settings: Settings, shares: Mapping[str, float], examples: Examples, run: Unfinished,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self.model: Any = model
        self.settings: Any = settings
        self.shares, self.examples, self.unfinished, self.progress = shares, examples, run, progress
        self.done: dict[str, int] = dict(run.state.get("done", {}))
        self.history: list[Row] = list(run.state.get("history", []))

    @abstractmethod
    def enter(self, stage: str) -> None:
        """Set up the model for `stage`; "before" is the dense model before any stage."""

    @abstractmethod
    def judge(self, prediction: EvalPrediction) -> dict[str, Any]:
        """Metrics of the held-out samples besides the loss."""

    @abstractmethod
    def row(self, stage: str, step: int, metrics: Mapping[str, Any]) -> Row:
        """A row of the history for one evaluation, with `stage` and `step`; JSON types."""

    def skip(self, stage: str) -> None:
        """Called in place of a stage that has no share."""
        return

    def behind(self, stage: str) -> None:
        """Called after each stage, whether it ran now, ran earlier or has no share."""
        return

    @property
    def follower(self) -> type[FollowStage]:
        """The callback that follows the clock of a stage."""
        return FollowStage

    def run(self, start: float) -> dict[str, Any]:
        """Run the remaining stages.

        Args:
            start: reading of the monotonic clock when the run began or resumed.

        Returns:
            the record: steps of each stage, history, and metrics of the last evaluation.
        """
        start -= float(self.unfinished.state.get("seconds", 0.0))  # as if it had never been interrupted
        if not self.history:
            self.unfinished.keep(done={}, history=[], seconds=0.0)
        for stage in self.names:
            if stage in self.done:
                self.model.load_state_dict(load_file(self._file(stage)))
            elif stage in self.shares:
                start = self.stage(stage, start)
            else:
                self.skip(stage)
            self.behind(stage)
        last = {key: value for key, value in self.history[-1].items() if key not in ("stage", "step")}
        return {"stages": self.done, "steps": sum(self.done.values()), "history": self.history} | last

    def stage(self, stage: str, start: float) -> float:
        """Run a stage; returns `start`, moved later if the stage resumed from a checkpoint."""
        scratch = self.scratch(stage)
        trainer, look = self.first_look(stage)
        checkpoint = last_checkpoint(scratch, self.follower.__name__)
        place, kept = checkpoint if checkpoint is not None else (None, None)
        if kept is not None:  # time counts on from the checkpoint
            start = time.monotonic() - float(kept["total"])
        clock = Clock(
            self.ends(stage), self.steps(stage), start, 2 * look, ran=0.0 if kept is None else float(kept["ran"])
        )
        follow = self.follower(self, stage, clock, start, kept)
        trainer.add_callback(follow)
        set_seed(self.settings.seed + 1 + self.names.index(stage))
        if clock.at(0) < 1:
            trainer.train(resume_from_checkpoint=None if place is None else str(place))
        trainer.remove_callback(follow)
        step = trainer.state.global_step
        self.warn_if_cut_short(stage, step)
        follow.end()
        self.finish(stage, step, [*follow.history, follow.row(step, trainer.evaluate())], start)
        return start

    def first_look(self, stage: str) -> tuple[Trainer, float]:
        """Enter a stage; returns its Trainer, and the seconds that one evaluation takes.

        The first evaluation of a run is that of the dense model, and begins the history.
        """
        self.enter(stage)
        trainer = make_trainer(
            self.model, self.examples, self.settings, self.scratch(stage), groups=self.model.groups, judge=self.judge
        )
        began = time.monotonic()
        if not self.history:
            self.enter("before")
            self.history.append(self.checked_row("before", 0, trainer.evaluate()))
            self.enter(stage)
        else:
            trainer.evaluate()
        return trainer, time.monotonic() - began

    def checked_row(self, stage: str, step: int, metrics: Mapping[str, Any]) -> Row:
        """The result of `row`, checked for a finite loss.

        Raises:
            TrimtabError: training diverged.
        """
        require_finite(metrics["eval_loss"], self.method, f"at step {step} of the stage {stage}")
        return self.row(stage, step, metrics)

    def finish(self, stage: str, step: int, rows: list[Row], start: float) -> None:
        """Write the weights after a stage, and remove the stage's checkpoints."""
        self.history += rows
        self.done[stage] = step
        if is_first_process():
            part = self._file(stage).with_suffix(".part")
            part.parent.mkdir(exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}, part)
            part.replace(self._file(stage))
        self.unfinished.keep(done=self.done, history=self.history, seconds=time.monotonic() - start)
        if is_first_process():
            shutil.rmtree(self.scratch(stage), ignore_errors=True)

    def warn_if_cut_short(self, stage: str, step: int) -> None:
        """Warn if the time limit ended a stage before its last step, or before its first."""
        steps = self.steps(stage)
        if steps is not None and step < steps:
            log.warning(
                "%s: the time was over after %d of %d steps of the stage %s; give more --minutes",
                self.method, step, steps, stage,
            )  # fmt: skip
        if step == 0:
            log.warning(f"{self.method}: the stage %s ran no step, so what it learns is as it began", self.shown[stage])

    def ends(self, stage: str) -> float:
        """Minutes from the start of the run to the end of a stage."""
        number = self.names.index(stage)
        return float(self.settings.minutes) * sum(
            share for name, share in self.shares.items() if self.names.index(name) <= number
        )

    def steps(self, stage: str) -> int | None:
        """Steps of a stage; None if time limits the stage."""
        steps: int | None = self.settings.steps
        return steps and max(1, round(self.shares[stage] * steps))

    def scratch(self, stage: str) -> Path:
        """The folder of checkpoints of a running stage."""
        return self.unfinished.folder / stage

    def _file(self, stage: str) -> Path:
        return self.unfinished.folder / f"{stage}.safetensors"


def begin(job: Job, checkpoint: Checkpoint, settings: Settings, method: str) -> Unfinished:
    """The run that trains the job's result: a new run, or a killed run to resume.

    Raises:
        BuildError: as `Unfinished`.
    """
    origin = settings_record(job, settings) | {
        "method": method, "model": checkpoint.digest, "versions": package_versions(),
    }  # fmt: skip
    return Unfinished(job.out, origin, first=is_first_process())


def settings_record(job: Job, settings: Settings) -> Row:
    """Settings and data of a training, for its record."""
    return {"settings": settings.model_dump(), "data": job.dataset.sha256}


class FollowStage(Follow):
    """Follows the clock within a stage.

    Args:
        start: reading of the monotonic clock when the whole run began.
        kept: the state of this stage in a checkpoint.
    """

    def __init__(self, stages: Stages, stage: str, clock: Clock, start: float, kept: Mapping[str, Any] | None) -> None:
        super().__init__(stages.shown[stage], clock, stages.progress, saves=True, kept=kept)
        self.stages, self.stage, self._start = stages, stage, start

    def end(self) -> None:
        """Called after the last step."""

    def row(self, step: int, metrics: dict[str, Any]) -> Row:
        return self.stages.checked_row(self.stage, step, metrics)

    def state(self) -> dict[str, Any]:
        state = super().state()
        state["attributes"]["total"] = time.monotonic() - self._start
        return state
