"""The stages of a pyramid, one after the other. A killed run resumes from its last checkpoint."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from transformers import EvalPrediction, set_seed

from trimtab.compiler.data.tokenizer import load_tokenizer
from trimtab.compiler.sources import open_source
from trimtab.compiler.sources.checkpoint import read_checkpoint
from trimtab.compiler.sources.folder import token_limit
from trimtab.passes.anatomy import find_anatomy, require_ffns
from trimtab.passes.errors import ModelError
from trimtab.passes.ffn_route.routers import METHOD as ROUTED
from trimtab.passes.profile import PROFILE
from trimtab.training.before import load_learned
from trimtab.training.contract import Job, Trained
from trimtab.training.huggingface import is_first_process, prepare
from trimtab.training.linears import find_ffns
from trimtab.training.lte.routers import Routing
from trimtab.training.magic_pyramid.encoder import load_classifier, open_tokenizer_folder
from trimtab.training.magic_pyramid.judge import judge, row
from trimtab.training.magic_pyramid.pyramid import Pyramid
from trimtab.training.magic_pyramid.quantiles import fit_thresholds
from trimtab.training.magic_pyramid.result import summary, write_result
from trimtab.training.magic_pyramid.settings import METHOD, STAGES, Settings
from trimtab.training.stages import Stages, begin, settings_record
from trimtab.training.texts import labelled

_QUANTILES_OF = 256  # texts


def learn(job: Job, settings: Settings) -> Trained | None:
    """Train a classifier to a pyramid.

    Returns:
        the result in the first of several processes, None in the others.

    Raises:
        ModelError, DataError: model or data do not fit.
        TrimtabError: training diverged.
    """
    start = time.monotonic()
    prepare(settings)
    checkpoint = read_checkpoint(Path(job.model), allow_pickle=job.allow_pickle)
    set_seed(settings.seed)
    classifier = load_classifier(checkpoint, job.dataset, allow_pickle=job.allow_pickle)
    token_count_limit = token_limit(checkpoint.model, checkpoint.config)
    tokenizer = load_tokenizer(open_tokenizer_folder(checkpoint), token_count_limit)
    examples = labelled(
        job.dataset, tokenizer, classifier.names, int(classifier.model.config.num_labels or 0),
        min(settings.max_tokens, token_count_limit or settings.max_tokens), np.random.default_rng(settings.seed),
    )  # fmt: skip
    assert examples.lengths is not None
    pyramid = Pyramid(classifier.model, settings, float(examples.lengths.mean()))
    learned, routers = load_learned(checkpoint.folder, METHOD, ROUTED)
    pyramid.go_on(learned)
    if routers:
        ffns = require_ffns(find_anatomy(open_source(job.model, allow_pickle=job.allow_pickle).graph()))
        pyramid.routing = Routing.of(find_ffns(classifier.model, ffns), routers)
    if settings.hard and not pyramid.prunes:
        raise ModelError(
            f"{checkpoint.folder}: hard has no thresholds to prune by: its {PROFILE} is damaged or of other weights",
            hint="learn them (--soft 1), or take them from quantiles (--keep)",
        )
    run = begin(job, checkpoint, settings, METHOD)
    with run.released_on_error():
        stages = PyramidStages(pyramid, settings, settings.shares(classifier.new_head), examples, run, job.progress)
        record = stages.run(start)
    if not is_first_process():
        return None
    record |= settings_record(job, settings) | {"layers": pyramid.layers}
    write = run.writer(lambda out: write_result(pyramid, checkpoint, record, job, out))
    return Trained(record, summary(record, job.out), write)


class PyramidStages(Stages):
    """The stages of a pyramid."""

    method = METHOD
    names = STAGES
    shown: ClassVar[Mapping[str, str]] = {
        "fine_tune": "fine-tune",
        "soft": "soft mask",
        "hard": "hard mask",
        "exits": "exits",
    }

    _pruned = _left = False

    def enter(self, stage: str) -> None:
        self._pruned = self.model.prunes and stage not in ("before", "fine_tune")
        self.model.enter("fine_tune" if stage == "before" else stage, pruned=self._pruned)
        self._left = stage != "before" and self.model.exits_learn

    def judge(self, prediction: EvalPrediction) -> dict[str, Any]:
        return judge(prediction)

    def row(self, stage: str, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        return row(stage, step, metrics, pruned=self._pruned, left=self._left)

    def skip(self, stage: str) -> None:
        """Replace the stage `soft` by thresholds from quantiles."""
        if stage == "soft" and self.settings.takes_quantiles:
            fit_thresholds(self.model, self._some, self.settings.keep)

    def behind(self, stage: str) -> None:
        """After `fine_tune`, the model becomes the teacher of later stages."""
        taught = {"soft", "hard"} & (self.shares.keys() - self.done.keys())
        if stage == "fine_tune" and self.settings.distil and taught:
            self.model.teach(copy.deepcopy(self.model))

    def _some(self) -> Iterator[dict[str, Any]]:
        """Batches of the same few texts at each call, of like lengths."""
        return self.examples.some(_QUANTILES_OF, self.settings.batch_size)
