"""Fine-tune a Hugging Face model so that its FFNs need few neurons for each token."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from trimtab.compiler.data import Dataset
from trimtab.compiler.data.tokenizer import load_tokenizer
from trimtab.compiler.recipe import Recipe
from trimtab.compiler.sources import Source, open_source
from trimtab.compiler.sources.checkpoint import Checkpoint, is_checkpoint, read_checkpoint
from trimtab.compiler.sources.export import load_model
from trimtab.compiler.task import find_task
from trimtab.passes.anatomy import FFN, find_anatomy, require_ffns, select_ffns
from trimtab.passes.errors import BuildError, ModelError, RecipeError, TrimtabError
from trimtab.passes.ffn_topk.topk import FFNTopK
from trimtab.passes.graph import load_graph
from trimtab.training.clock import Clock
from trimtab.training.distill import bfloat16_is_fast
from trimtab.training.topk.anneal import Anneal, Progress
from trimtab.training.topk.find import down_projections
from trimtab.training.topk.settings import Settings
from trimtab.training.topk.sparse import SparseFFNs
from trimtab.training.topk.texts import Examples, labelled, packed

__all__ = ["finetune"]

log = logging.getLogger(__name__)

RECORD = "topk.json"
"""In the folder of a fine-tuned model: how it came about, and how well it does."""

_BESIDE = ("*.json", "*.txt", "*.model")
_NEVER = 10**9  # steps: the clock ends a run


def finetune(
    folder: Path, recipe: Recipe, dataset: Dataset, settings: Settings, out: Path, *,
    allow_pickle: bool = False, progress: Progress | None = None,
) -> dict[str, Any] | None:  # fmt: skip
    """Teach the model in `folder` to do with the neurons that the recipe's `ffn-topk` wants of each token.

    Under torchrun or accelerate's launcher, each process works on its share of the batches.

    Args:
        dataset: texts for a language model, labelled ones for a classifier; 5 %, at most 512, are held out.
        out: folder to write the new model to, which appears whole or not at all.
        progress: is called with (what, done, total).

    Returns:
        The record: settings, losses on the held-out texts, history. Of several processes the first has it, and writes
        the model; the others return None.

    Raises:
        RecipeError: no `ffn-topk` in the recipe.
        ModelError: not a Hugging Face directory, or of a kind that has no loss to learn from.
        DataError: texts that do not fit.
        BuildError: `out` cannot be written.
        TrimtabError: training diverged.
    """
    start = time.monotonic()
    disable_progress_bar()  # transformers' own: `progress` tells what a user waits for
    step = wanted_of(recipe)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and settings.steps is None:
        raise TrimtabError("the clocks of several processes differ", hint="give the length of the run with --steps")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BuildError(f"{out}: exists already", hint="choose another folder, or remove this one")
    if not is_checkpoint(folder):
        raise ModelError(f"{folder}: no Hugging Face directory", hint="topk changes the model itself: give its folder")
    checkpoint = read_checkpoint(folder, allow_pickle=allow_pickle)
    source = open_source(folder, allow_pickle=allow_pickle)
    ffns = _ffns(source, step)
    torch.manual_seed(settings.seed)
    model = load_model(checkpoint.model, checkpoint.architecture, allow_pickle=allow_pickle)
    examples = _examples(source, checkpoint, model, dataset, settings)
    sparse = SparseFFNs(down_projections(model, ffns), step.block)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            record = _train(model, sparse, step.density, examples, settings, start, Path(scratch), progress)
    finally:
        sparse.remove()
    record = asdict(settings) | {"density": step.density, "block": step.block, "data": dataset.sha256} | record
    if int(os.environ.get("RANK", "0")) > 0:
        return None
    _save(model, checkpoint.model, record, out)
    return record


def wanted_of(recipe: Recipe) -> FFNTopK:
    """The recipe's `ffn-topk`.

    Raises:
        RecipeError: it has none.
    """
    for step in recipe.passes:
        if isinstance(step, FFNTopK):
            return step
    raise RecipeError(
        "the recipe has no pass 'ffn-topk': it says how many neurons the model shall need",
        hint="add it to `passes`, such as `ffn-topk: {density: 0.1}`",
    )


def _ffns(source: Source, step: FFNTopK) -> list[FFN]:
    anatomy = find_anatomy(source.graph())
    require_ffns(anatomy)
    found = list(select_ffns(anatomy, step.layers))
    for ffn in found:
        if ffn.d_ff % step.block:
            raise RecipeError(f"block: blocks of {step.block} do not divide the {ffn.d_ff} neurons of {ffn.where}")
    return found


def _examples(
    source: Source, checkpoint: Checkpoint, model: PreTrainedModel, dataset: Dataset, settings: Settings
) -> Examples:
    if source.tokenizer is None:
        raise ModelError(f"{checkpoint.folder}: has no tokenizer", hint="save the model with its tokenizer")
    tokenizer, rng = load_tokenizer(source.tokenizer), np.random.default_rng(settings.seed)
    limit = min(settings.max_tokens, source.max_tokens or settings.max_tokens)
    if checkpoint.architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return packed(dataset, tokenizer, limit, rng)
    if checkpoint.architecture.endswith("ForSequenceClassification"):
        graph = load_graph(source.onnx)
        task = find_task(graph.inputs, graph.outputs, source.head)
        if task is None or task.kind != "classes":
            raise ModelError(
                f"{checkpoint.folder}: --method topk trains classifiers that give a text one class; this model gives "
                f"it {'a score' if task is not None and task.kind == 'score' else 'any number of labels'}",
                hint="fine-tune it yourself, or use --method recover, which distils any model",
            )
        return labelled(dataset, tokenizer, source.labels, int(model.config.num_labels or 0), limit, rng)
    raise ModelError(
        f"{checkpoint.architecture} has no loss to learn from", hint="give a causal language model or a text classifier"
    )


def _train(
    model: PreTrainedModel, sparse: SparseFFNs, density: float, examples: Examples, settings: Settings, start: float,
    scratch: Path, progress: Progress | None,
) -> dict[str, Any]:  # fmt: skip
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(scratch), max_steps=_NEVER, per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size, learning_rate=settings.lr, lr_scheduler_type="constant",
        weight_decay=settings.weight_decay, adam_beta2=0.98, max_grad_norm=1.0, seed=settings.seed,
        use_cpu=not cuda, bf16=bfloat16_is_fast(torch.device("cuda" if cuda else "cpu")), dataloader_pin_memory=cuda,
        save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, data_collator=examples.collate, train_dataset=examples.train, eval_dataset=examples.held_out
    )
    trainer.remove_callback(PrinterCallback)

    def held_out(at: float) -> float:
        sparse.density = at
        loss = float(trainer.evaluate()["eval_loss"])
        if not math.isfinite(loss):
            raise TrimtabError(f"topk: the loss is {loss} at density {at:g}", hint="use a smaller --lr")
        return loss

    began = time.monotonic()
    losses = {"dense": held_out(1.0)}
    look = time.monotonic() - began
    losses["before"] = held_out(density)
    clock = Clock(settings.minutes, settings.steps, start, 2 * look)
    anneal = Anneal(sparse, density, settings, clock, progress)
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


def _save(model: PreTrainedModel, folder: Path, record: dict[str, Any], out: Path) -> None:
    """The model with its tokenizer, as `folder` has it."""
    part = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(part)
        for path in (found for pattern in _BESIDE for found in folder.glob(pattern)):
            if not (part / path.name).exists() and not path.name.endswith(".index.json"):
                shutil.copyfile(path, part / path.name)
        (part / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        part.replace(out)
    except OSError as error:
        message = f"{out}: cannot write the model ({error.strerror or error})"
        raise BuildError(message, hint="choose another folder") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
