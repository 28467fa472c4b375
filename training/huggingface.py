"""Training of Hugging Face models on transformers' Trainer, which runs in one process or in many.

Our clock leads: it sets the learning rate, says when the held-out samples are looked at, and ends the run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar

from trimtab.compiler.phases import Progress
from trimtab.passes.errors import TrimtabError
from trimtab.training.clock import Clock, schedule
from trimtab.training.contract import Settings
from trimtab.training.device import best_device, bfloat16_is_fast
from trimtab.training.texts import Examples

_NEVER = 10**9  # steps: the clock ends a run


def check_processes(settings: Settings) -> None:
    """Refuse a run of several processes that only the time would end.

    Raises:
        TrimtabError: each process has a clock of its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and settings.steps is None:
        raise TrimtabError("the clocks of several processes differ", hint="give the length of the run with --steps")


def is_first_process() -> bool:
    """Whether this process is the one of a training that writes and reports."""
    return int(os.environ.get("RANK", "0")) == 0


def make_trainer(
    model: nn.Module, examples: Examples, settings: Settings, scratch: Path, *, kind: type[Trainer] = Trainer,
    **more: Any,
) -> Trainer:  # fmt: skip
    """transformers' Trainer as all methods use it: AdamW, bfloat16 where it is fast, our clock in place of epochs.

    Args:
        scratch: for the Trainer's own files.
        kind: the class to make.
        more: of TrainingArguments, by name.
    """
    disable_progress_bar()  # transformers' own: `Follow` tells what a user waits for
    device = best_device()
    cuda = device.type == "cuda"
    arguments: dict[str, Any] = {
        "output_dir": str(scratch), "max_steps": _NEVER, "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size, "learning_rate": settings.lr,
        "lr_scheduler_type": "constant", "weight_decay": settings.weight_decay, "adam_beta2": 0.98,
        "max_grad_norm": 1.0, "seed": settings.seed, "use_cpu": not cuda, "bf16": bfloat16_is_fast(device),
        "dataloader_pin_memory": cuda, "save_strategy": "no", "logging_strategy": "no", "report_to": [],
        "disable_tqdm": True, "remove_unused_columns": False,
    }  # fmt: skip
    trainer = kind(
        model, TrainingArguments(**arguments | more), data_collator=examples.collate, train_dataset=examples.train,
        eval_dataset=examples.held_out,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def require_finite(loss: float, method: str, where: str) -> None:
    """Refuse a loss that is no number.

    Raises:
        TrimtabError: training diverged.
    """
    if not math.isfinite(loss):
        raise TrimtabError(f"{method}: the loss is {loss} {where}", hint="use a smaller --lr")


class Follow(TrainerCallback):
    """Lets a run follow the clock.

    Args:
        what: what progress is called.
    """

    def __init__(self, what: str, clock: Clock, progress: Progress | None) -> None:
        self.clock, self._what, self._progress = clock, what, progress
        self._rates: list[float] | None = None
        self.look_at = clock.every
        """Share of the run at which the held-out samples are looked at next."""

    def begin_step(self, at: float) -> None:
        """Called before each step, at the share `at` of the run."""

    def looked(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called after each look at the held-out samples."""

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
        if at >= self.look_at and at < 1:
            control.should_evaluate = True
            self.look_at = at + self.clock.every
        if self._progress is not None and state.is_world_process_zero:
            self._progress(self._what, round(min(at, 1) * self.clock.total), self.clock.total)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self.looked(state.global_step, given["metrics"])
