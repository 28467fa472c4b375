"""Fine-tune a Hugging Face model so that its FFNs need few neurons for each token."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from trimtab.compiler.progress import Progress
from trimtab.compiler.sources import Source, open_source
from trimtab.compiler.sources.checkpoint import read_checkpoint
from trimtab.compiler.sources.export import load_model
from trimtab.passes.anatomy import FFN, find_anatomy, require_ffns, select_ffns
from trimtab.passes.errors import RecipeError
from trimtab.passes.ffn_topk.topk import FFNTopK
from trimtab.passes.temporary import temporary_folder
from trimtab.training.clock import Clock
from trimtab.training.contract import Job, Trained
from trimtab.training.examples import read_examples
from trimtab.training.folder import new_folder, save_model
from trimtab.training.huggingface import is_first_process, make_trainer, prepare, require_finite
from trimtab.training.texts import Examples
from trimtab.training.topk.anneal import Anneal
from trimtab.training.topk.find import down_projections
from trimtab.training.topk.settings import Settings
from trimtab.training.topk.sparse import SparseFFNs

log = logging.getLogger(__name__)

RECORD = "topk.json"
"""File in the folder of a fine-tuned model: settings and metrics of the training."""

_PERPLEXITIES = {"dense": "dense", "before": "with the top-k before training", "after": "after"}


def finetune(job: Job, step: FFNTopK, settings: Settings) -> Trained | None:
    """Fine-tune a model to work with the top-k neurons that `step` keeps for each token.

    Args:
        job: the job, with texts for a language model, or labelled texts for a classifier.

    Returns:
        the result in the first of several processes, None in the others. Its record has settings, losses on the
        held-out texts, and history.

    Raises:
        RecipeError: `step` does not fit the model.
        ModelError: the model is neither a language model nor a classifier.
        DataError: the texts do not fit.
        TrimtabError: training diverged.
    """
    start = time.monotonic()
    prepare(settings)
    checkpoint = read_checkpoint(Path(job.model), allow_pickle=job.allow_pickle)
    source = open_source(job.model, allow_pickle=job.allow_pickle)
    ffns = _ffns(source, step)
    torch.manual_seed(settings.seed)
    model = load_model(checkpoint.model, checkpoint.architecture, allow_pickle=job.allow_pickle)
    examples = read_examples(source, checkpoint, model, job.dataset, settings, "topk")
    sparse = SparseFFNs(down_projections(model, ffns), step.block)
    try:
        with temporary_folder("topk") as scratch:
            record = _train(model, sparse, step.density, examples, settings, start, scratch, job.progress)
    finally:
        sparse.remove()
    record = settings.model_dump() | {"density": step.density, "block": step.block, "data": job.dataset.sha256} | record
    if not is_first_process():
        return None

    def write(out: Path) -> None:
        with new_folder(out) as part:
            save_model(model, checkpoint.model, record, RECORD, part)

    perplexities = ", ".join(f"{math.exp(record['losses'][key]):.3f} {what}" for key, what in _PERPLEXITIES.items())
    return Trained(record, f"perplexity on held-out samples: {perplexities}; the model is in {job.out}", write)


def _ffns(source: Source, step: FFNTopK) -> list[FFN]:
    anatomy = find_anatomy(source.graph())
    require_ffns(anatomy)
    ffns = list(select_ffns(anatomy, step.layers))
    for ffn in ffns:
        if ffn.d_ff % step.block:
            raise RecipeError(
                f"block: blocks of {step.block} do not divide the {ffn.d_ff} neurons of {ffn.where}",
                hint="choose a block that does, such as 1",
            )
    return ffns


def _train(
    model: PreTrainedModel, sparse: SparseFFNs, density: float, examples: Examples, settings: Settings, start: float,
    scratch: Path, progress: Progress | None,
) -> dict[str, Any]:  # fmt: skip
    trainer = make_trainer(model, examples, settings, scratch)

    def held_out(at: float) -> float:
        sparse.density = at
        loss = float(trainer.evaluate()["eval_loss"])
        require_finite(loss, "topk", f"at density {at:g}")
        return loss

    began = time.monotonic()
    losses = {"dense": held_out(1.0)}
    look = time.monotonic() - began
    losses["before"] = held_out(density)
    clock = Clock(settings.minutes, settings.steps, start, 2 * look)
    anneal = Anneal(sparse, density, settings.ramp, clock, progress)
    trainer.add_callback(anneal)
    if clock.at(0) < 1:
        trainer.train()
    steps = trainer.state.global_step
    trainer.remove_callback(anneal)
    losses["after"] = held_out(density)
    if losses["after"] > losses["before"]:
        log.warning("topk: the loss rose from %.4f to %.4f; use a smaller --lr", losses["before"], losses["after"])
    history = [*anneal.history, {"step": steps, "density": density, "loss": losses["after"]}]
    return {"steps": steps, "losses": losses, "history": history}
