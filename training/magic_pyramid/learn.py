"""The stages of a pyramid, one after the other; a run that was killed goes on where its last checkpoint is."""

from __future__ import annotations

import copy
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import set_seed

from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.data.tokenizer import load_tokenizer
from trimtab.compiler.phases import Progress
from trimtab.compiler.sources.checkpoint import read_checkpoint
from trimtab.compiler.sources.folder import token_limit
from trimtab.passes.errors import ModelError
from trimtab.passes.profile import PROFILE
from trimtab.training.clock import Clock
from trimtab.training.contract import Job, Trained
from trimtab.training.huggingface import (
    Follow,
    is_first_process,
    last_checkpoint,
    make_trainer,
    prepare,
    require_finite,
)
from trimtab.training.magic_pyramid.before import METHOD, load_learned
from trimtab.training.magic_pyramid.encoder import load_classifier, open_tokenizer_folder
from trimtab.training.magic_pyramid.judge import judge, row
from trimtab.training.magic_pyramid.pyramid import Pyramid
from trimtab.training.magic_pyramid.quantiles import fit_thresholds
from trimtab.training.magic_pyramid.result import summary, write_result
from trimtab.training.magic_pyramid.settings import STAGES, Settings
from trimtab.training.resume import Unfinished
from trimtab.training.texts import Examples, labelled

log = logging.getLogger(__name__)

_QUANTILES_OF = 256  # texts

_SHOWN = {"fine_tune": "fine-tune", "soft": "soft mask", "hard": "hard mask", "exits": "exits"}


def learn(job: Job, settings: Settings) -> Trained | None:
    """Train a classifier to a pyramid.

    Returns:
        Of several processes the first has it; the others return None.

    Raises:
        ModelError, DataError: model or data do not fit.
        TrimtabError: training diverged.
    """
    start = time.monotonic()
    prepare(settings)
    checkpoint = read_checkpoint(Path(job.model), allow_pickle=job.allow_pickle)
    set_seed(settings.seed)
    classifier = load_classifier(checkpoint, job.dataset, allow_pickle=job.allow_pickle)
    most = token_limit(checkpoint.model, checkpoint.config)
    tokenizer = load_tokenizer(open_tokenizer_folder(checkpoint), most)
    examples = labelled(
        job.dataset, tokenizer, classifier.names, int(classifier.model.config.num_labels or 0),
        min(settings.max_tokens, most or settings.max_tokens), np.random.default_rng(settings.seed),
    )  # fmt: skip
    assert examples.lengths is not None
    pyramid = Pyramid(classifier.model, settings, float(examples.lengths.mean()))
    pyramid.go_on(load_learned(checkpoint.folder))
    if settings.hard and not pyramid.prunes:
        raise ModelError(
            f"{checkpoint.folder}: hard has no thresholds to prune by: its {PROFILE} is damaged or of other weights",
            hint="learn them (--soft 1), or take them from quantiles (--keep)",
        )
    made_of = {
        "method": METHOD, "settings": settings.model_dump(), "data": job.dataset.sha256, "model": checkpoint.digest,
        "versions": package_versions(),
    }  # fmt: skip
    run = Unfinished(job.out, made_of, first=is_first_process())
    try:
        stages = Stages(pyramid, settings, settings.shares(classifier.new_head), examples, run, job.progress)
        record = stages.run(start)
    except BaseException:
        run.release()
        raise
    if not is_first_process():
        return None
    record |= {"settings": settings.model_dump(), "data": job.dataset.sha256, "layers": pyramid.layers}

    def write(out: Path) -> None:
        try:
            write_result(pyramid, checkpoint, record, job, out)
        except BaseException:
            run.release()
            raise
        run.finish()

    return Trained(record, summary(record, job.out), write)


class Stages:
    """The stages of one run.

    Args:
        shares: stage → its share of the run, of those that run.
        run: what is done already, and where checkpoints go.
    """

    def __init__(
        self, pyramid: Pyramid, settings: Settings, shares: dict[str, float], examples: Examples, run: Unfinished,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self._pyramid, self._settings, self._shares, self._examples = pyramid, settings, shares, examples
        self._run, self._progress = run, progress
        self._done: dict[str, int] = dict(run.state.get("done", {}))
        self._history: list[dict[str, Any]] = list(run.state.get("history", []))

    def run(self, start: float) -> dict[str, Any]:
        """Run what is left to run.

        Args:
            start: reading of the monotonic clock at which the run began, or went on.

        Returns:
            the record: steps of each stage, history, and how the last look was.
        """
        start -= float(self._run.state.get("seconds", 0.0))  # as if it had never been interrupted
        if not self._history:
            self._run.keep(done={}, history=[], seconds=0.0)
        for stage in STAGES:
            if stage in self._done:
                self._pyramid.load_state_dict(load_file(self._file(stage)))
            elif stage in self._shares:
                start = self._stage(stage, start)
            elif stage == "soft" and self._settings.takes_quantiles:
                fit_thresholds(self._pyramid, self._some, self._settings.keep)
            taught = {"soft", "hard"} & (self._shares.keys() - self._done.keys())
            if stage == "fine_tune" and self._settings.distil and taught:
                self._pyramid.teach(copy.deepcopy(self._pyramid))
        last = {key: value for key, value in self._history[-1].items() if key not in ("stage", "step")}
        return {"stages": self._done, "steps": sum(self._done.values()), "history": self._history} | last

    def _stage(self, stage: str, start: float) -> float:
        """Run a stage; returns `start`, which is later where the stage goes on from a checkpoint."""
        number, settings, scratch = STAGES.index(stage), self._settings, self._run.folder / stage
        pruned = self._pyramid.prunes and stage != "fine_tune"
        self._pyramid.enter(stage, pruned=pruned)
        left = self._pyramid.exits_learn
        optimizer = torch.optim.AdamW(self._pyramid.groups(), betas=(0.9, 0.98), fused=True)
        trainer = make_trainer(self._pyramid, self._examples, settings, scratch, optimizer=optimizer, judge=judge)
        began = time.monotonic()
        if not self._history:
            self._pyramid.enter("fine_tune", pruned=False)  # the dense model
            self._history.append(row("before", 0, trainer.evaluate(), pruned=False, left=False))
            self._pyramid.enter(stage, pruned=pruned)
        else:
            trainer.evaluate()  # tells how long a look takes
        look = time.monotonic() - began
        found = last_checkpoint(scratch, _Follow.__name__)
        place, kept = found if found is not None else (None, None)
        if kept is not None:  # time counts on from the checkpoint
            start = time.monotonic() - float(kept["total"])
        ends = sum(share for name, share in self._shares.items() if STAGES.index(name) <= number)
        steps = settings.steps and max(1, round(self._shares[stage] * settings.steps))
        clock = Clock(settings.minutes * ends, steps, start, 2 * look, ran=0.0 if kept is None else float(kept["ran"]))
        follow = _Follow(stage, clock, self._progress, start, kept, pruned=pruned, left=left)
        trainer.add_callback(follow)
        set_seed(settings.seed + 1 + number)
        if clock.at(0) < 1:
            trainer.train(resume_from_checkpoint=None if place is None else str(place))
        trainer.remove_callback(follow)
        step = trainer.state.global_step
        if steps is not None and step < steps:
            log.warning(
                "magic-pyramid: the time was over after %d of %d steps of the stage %s; give more --minutes",
                step, steps, stage,
            )  # fmt: skip
        if step == 0:
            log.warning("magic-pyramid: the stage %s ran no step, so what it learns is as it began", _SHOWN[stage])
        self._history += [*follow.history, follow.row(step, trainer.evaluate())]
        self._done[stage] = step
        self._keep(stage, scratch, time.monotonic() - start)
        return start

    def _some(self) -> Iterator[dict[str, Any]]:
        """Batches of the same few texts at each call, of like lengths."""
        lengths, size = self._examples.lengths, self._settings.batch_size
        assert lengths is not None
        order = np.argsort(lengths[:_QUANTILES_OF], kind="stable")
        for i in range(0, len(order), size):
            yield self._examples.collate([self._examples.train[int(place)] for place in order[i : i + size]])

    def _keep(self, stage: str, scratch: Path, seconds: float) -> None:
        """Write the weights behind a stage, and what was needed only to get there goes."""
        if is_first_process():
            part = self._file(stage).with_suffix(".part")
            part.parent.mkdir(exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in self._pyramid.state_dict().items()}, part)
            part.replace(self._file(stage))
        self._run.keep(done=self._done, history=self._history, seconds=seconds)
        if is_first_process():
            shutil.rmtree(scratch, ignore_errors=True)

    def _file(self, stage: str) -> Path:
        return self._run.folder / f"{stage}.safetensors"


class _Follow(Follow):
    """Follows the clock within a stage.

    Args:
        start: reading of the monotonic clock at which the whole run began.
    """

    def __init__(
        self, stage: str, clock: Clock, progress: Progress | None, start: float, kept: dict[str, Any] | None, *,
        pruned: bool, left: bool,
    ) -> None:  # fmt: skip
        super().__init__(_SHOWN[stage], clock, progress, saves=True, kept=kept)
        self._stage, self._start, self._pruned, self._left = stage, start, pruned, left

    def row(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        require_finite(metrics["eval_loss"], METHOD, f"at step {step} of the stage {self._stage}")
        return row(self._stage, step, metrics, pruned=self._pruned, left=self._left)

    def state(self) -> dict[str, Any]:
        state = super().state()
        state["attributes"]["total"] = time.monotonic() - self._start
        return state
