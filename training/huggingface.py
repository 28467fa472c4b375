"""Training of Hugging Face models with transformers' Trainer, which runs in one process or in many.

Our clock controls the run: it sets the learning rate, starts evaluations on the held-out samples, and ends the run.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import (
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.utils.logging import disable_progress_bar

from trimtab.compiler.progress import Progress
from trimtab.passes.errors import TrimtabError
from trimtab.training.clock import Clock, schedule
from trimtab.training.contract import Settings
from trimtab.training.device import best_device, bfloat16_is_fast
from trimtab.training.epoch import epoch
from trimtab.training.texts import Examples

_NEVER = 10**9  # steps: the clock ends a run


def prepare(settings: Settings) -> None:
    """Hide transformers' own progress, since `Follow` shows ours; refuse several processes that only time would end.

    Raises:
        TrimtabError: each process has a clock of its own.
    """
    disable_progress_bar()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and settings.steps is None:
        raise TrimtabError("the clocks of several processes differ", hint="give the length of the run with --steps")


def is_first_process() -> bool:
    """Whether this process is the one of a training that writes and reports."""
    return int(os.environ.get("RANK", "0")) == 0


def make_trainer(
    model: nn.Module, examples: Examples, settings: Settings, scratch: Path, *,
    groups: Callable[[], list[dict[str, Any]]] | None = None,
    judge: Callable[[EvalPrediction], dict[str, Any]] | None = None,
) -> Trainer:  # fmt: skip
    """transformers' Trainer as all methods use it: AdamW, bfloat16 where it is fast, our clock in place of epochs.

    Args:
        scratch: for the Trainer's own files.
        groups: what learns, for AdamW: groups of parameters, asked for once they are where training leaves them; all of
            `model` if it is not given.
        judge: more metrics of the held-out samples.
    """
    device = best_device()
    cuda = device.type == "cuda"
    arguments = TrainingArguments(
        output_dir=str(scratch), max_steps=_NEVER, per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size, learning_rate=settings.lr, lr_scheduler_type="constant",
        weight_decay=settings.weight_decay, adam_beta2=0.98, max_grad_norm=1.0, seed=settings.seed, use_cpu=not cuda,
        bf16=bfloat16_is_fast(device), dataloader_pin_memory=cuda, save_strategy="no", save_total_limit=1,
        logging_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = _Trainer(
        model, arguments, data_collator=examples.collate, train_dataset=examples.train,
        eval_dataset=examples.held_out, compute_metrics=judge,
    )  # fmt: skip
    trainer.lengths, trainer.groups = examples.lengths, groups
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Trainer(Trainer):
    """Takes samples of like length together, and has AdamW learn groups of parameters, where these are given."""

    lengths: np.ndarray | None = None
    groups: Callable[[], list[dict[str, Any]]] | None = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.groups is None or self.optimizer is not None:
            return super().create_optimizer(model)
        self.optimizer = torch.optim.AdamW(self.groups(), betas=(0.9, 0.98), fused=True)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        return _LikeLengths(self.lengths, self.args.train_batch_size, self.args.seed)


class _LikeLengths(Sampler[int]):
    """Samples in the order of `epoch`, the same for the same seed and number of the epoch."""

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed, self._epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        batches = list(epoch(self._lengths, self._batch_size, np.random.default_rng((self._seed, self._epoch))))
        batches.sort(key=len, reverse=True)  # stable: the smaller one last, since batches are cut of this order again
        return (int(place) for batch in batches for place in batch)

    def set_epoch(self, number: int) -> None:
        """Called before each epoch."""
        self._epoch = number


def last_checkpoint(scratch: Path, name: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete checkpoint of a Trainer and the state of its `Follow` callback; None without a checkpoint.

    Args:
        name: name of the callback's class.
    """
    folders = sorted(scratch.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    return next((each for folder in folders if (each := _kept(folder, name)) is not None), None)


def _kept(place: Path, name: str) -> tuple[Path, dict[str, Any]] | None:
    try:  # the Trainer writes this file last
        state = json.loads((place / "trainer_state.json").read_text(encoding="utf-8"))
        return place, dict(state["stateful_callbacks"][name]["attributes"])
    except (OSError, ValueError, KeyError):
        return None


def require_finite(loss: float, method: str, where: str, option: str = "--lr") -> None:
    """Refuse a loss that is no number.

    Args:
        option: the learning rate that was too high.

    Raises:
        TrimtabError: training diverged.
    """
    if not math.isfinite(loss):
        raise TrimtabError(f"{method}: the loss is {loss} {where}", hint=f"use a smaller {option}")


class Follow(TrainerCallback, ExportableState):
    """Trainer callback: the run follows the clock.

    Args:
        what: name of the run in progress messages.
        saves: write a checkpoint after each evaluation.
        kept: state of a run to resume, from `last_checkpoint`.

    Attributes:
        history: the result of `row` for each evaluation.
    """

    def __init__(
        self, what: str, clock: Clock, progress: Progress | None, *, saves: bool = False,
        kept: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.clock, self._what, self._progress, self._saves = clock, what, progress, saves
        self._rates: list[float] | None = None
        self._look_at = clock.every if kept is None else float(kept["look_at"])
        self.history: list[dict[str, Any]] = [] if kept is None else list(kept["history"])

    def begin_step(self, at: float) -> None:
        """Called before each step, at the share `at` of the run."""

    def row(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """A row of the history with the Trainer's metrics."""
        return {"step": step, "loss": metrics["eval_loss"]}

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint stores."""
        attributes = {"look_at": self._look_at, "history": self.history, "ran": self.clock.ran}
        return {"args": {}, "attributes": attributes}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        at, groups = self.clock.at(state.global_step), given["optimizer"].param_groups
        self.begin_step(at)
        if self._rates is None:
            self._rates = [group["initial_lr"] for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate * schedule(at)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        at = self.clock.at(state.global_step)
        control.should_training_stop = at >= 1
        if at >= self._look_at and at < 1:
            control.should_evaluate, control.should_save = True, self._saves
            self._look_at = at + self.clock.every
        if self._progress is not None and state.is_world_process_zero:
            self._progress(self._what, round(min(at, 1) * self.clock.total), self.clock.total)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self.history.append(self.row(state.global_step, given["metrics"]))
