"""`trimtab train --method lte`, from a model's folder to that of a new one."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import set_seed

from trimtab.compiler.sources import open_source
from trimtab.compiler.sources.checkpoint import Checkpoint, read_checkpoint
from trimtab.compiler.sources.export import load_model
from trimtab.passes.anatomy import FFN, find_anatomy, require_ffns
from trimtab.passes.errors import ModelError, RecipeError, TrimtabError
from trimtab.passes.ffn_route.copy_router import unfit_for_copies
from trimtab.passes.ffn_route.grouping import check_groups
from trimtab.training.activations import ACTIVATIONS
from trimtab.training.contract import Job, Trained
from trimtab.training.device import best_device
from trimtab.training.examples import kind_of, read_examples
from trimtab.training.folder import new_folder, save_model
from trimtab.training.huggingface import is_first_process, prepare
from trimtab.training.linears import find_ffns
from trimtab.training.lte.control import TOLERANCE
from trimtab.training.lte.groups import group
from trimtab.training.lte.routed import Routed
from trimtab.training.lte.settings import Settings
from trimtab.training.lte.stages import METHOD, LTEStages
from trimtab.training.profiled import write_profile
from trimtab.training.stages import begin, settings_record

RECORD = f"{METHOD}.json"
"""In the folder of a trained model: how it came about, and how well it does."""

log = logging.getLogger(__name__)


def learn(job: Job, settings: Settings) -> Trained | None:
    """Train routers, and the model to do with the groups of neurons that they choose.

    Returns:
        Of several processes the first has it; the others return None.

    Raises:
        RecipeError: groups that do not divide the model's FFNs, or a sparsity that no choice of groups reaches.
        ModelError, DataError: model or data do not fit.
        TrimtabError: training diverged, or its launcher shards weights.
    """
    start = time.monotonic()
    prepare(settings)
    _refuse_shards()
    checkpoint = read_checkpoint(Path(job.model), allow_pickle=job.allow_pickle)
    kind = kind_of(checkpoint)
    source = open_source(job.model, allow_pickle=job.allow_pickle)
    ffns = require_ffns(find_anatomy(source.graph()))
    _check(ffns, settings)
    set_seed(settings.seed)
    model = load_model(checkpoint.model, checkpoint.architecture, allow_pickle=job.allow_pickle)
    examples = read_examples(source, checkpoint, model, job.dataset, settings, METHOD)
    modules = find_ffns(model, ffns)
    run = begin(job, checkpoint, settings, METHOD)
    with run.released_on_error():
        routed = Routed(model, modules, settings, kind).to(best_device())
        group(routed, modules, examples, run, job.progress)
        stages = LTEStages(routed, settings, settings.shares(), examples, run, job.progress)
        stages.ffns = modules
        record = stages.run(start)
    if not is_first_process():
        return None
    record |= settings_record(job, settings) | {
        "ffns": [ffn.layer for ffn in modules], "routers": settings.learns_routers,
        "reached": not settings.learns_routers or abs(record["sparsity"] - settings.sparsity) <= TOLERANCE,
    }  # fmt: skip
    if not record["reached"]:
        log.warning(
            "lte: a sparsity of %.1f %% was asked for, and %.1f %% is the best reached, at a loss of %.4f on held-out "
            "texts; train longer, or use smaller groups", 100 * settings.sparsity, 100 * record["sparsity"],
            record["loss"],
        )  # fmt: skip

    write = run.writer(lambda out: write_result(routed, checkpoint, record, job, out))
    return Trained(record, summary(record, job.out), write)


def write_result(routed: Routed, checkpoint: Checkpoint, record: dict[str, Any], job: Job, out: Path) -> None:
    """Write a Hugging Face directory of the tuned model, with its Profile and its routers in it."""
    with new_folder(out) as part:
        save_model(routed.model, checkpoint.model, record, RECORD, part)
        tensors = routed.routing.tensors() if routed.settings.learns_routers else {}
        write_profile(part, job, METHOD, record, tensors)


def summary(record: dict[str, Any], out: Path) -> str:
    """One sentence on how the model does on the held-out samples."""
    what = "accuracy" if "accuracy" in record else "perplexity"
    first = record["history"][0]
    parts = [f"{what} on held-out samples {record[what]:.4f} (dense, before {first[what]:.4f})"]
    if record["routers"]:
        asked = record["settings"]["sparsity"]
        missed = "" if record["reached"] else f", of {asked:.1%} asked for: the best reached"
        parts.append(f"{record['sparsity']:.1%} of the FFNs' neurons left out{missed}")
    return f"{', '.join(parts)}; the model is in {out}, with its Profile"


def _refuse_shards() -> None:
    for name, variable in {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}.items():
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            raise TrimtabError(
                f"lte does not train under {name}: its stages hand on whole weights",
                hint=f"launch it without {name}; --lora-rank needs less memory",
            )


def _check(ffns: Sequence[FFN], settings: Settings) -> None:
    """Refuse groups and a sparsity that do not fit the FFNs."""
    for ffn in ffns:
        check_groups(ffn.d_ff, settings.group, ffn.where)
    groups = sum(ffn.d_ff // settings.group for ffn in ffns)
    most = 1 - len(ffns) / groups
    if settings.learns_routers and settings.sparsity > most + TOLERANCE:
        raise RecipeError(
            f"sparsity: {settings.sparsity:.1%} cannot be reached: one group of {settings.group} neurons is computed "
            f"for each token in any case, which leaves out {most:.1%} at most",
            hint="ask for less, or use smaller groups (--group)",
        )
    for ffn in ffns if settings.router == "copy" else ():
        reason = unfit_for_copies(ffn.d_model)
        if reason is not None:
            raise ModelError(f"{ffn.where}: {reason}", hint="train with --router linear")
    unknown = next((ffn for ffn in ffns if ffn.activation.name not in ACTIVATIONS), None)
    if (settings.layerwise or settings.router == "copy") and unknown is not None:
        raise ModelError(
            f"{unknown.where}: its activation is none of {', '.join(ACTIVATIONS)}",
            hint="train with --layerwise 0 --router linear",
        )
