"""The result of a pyramid: the folder of a new model, with its Profile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.compiler.data.preparation import TRANSFORMER_CONFIGS, read_preparation
from trimtab.compiler.sources.checkpoint import Checkpoint
from trimtab.passes.profile import PROFILE
from trimtab.training.contract import Job
from trimtab.training.folder import new_folder, save_model
from trimtab.training.magic_pyramid.encoder import open_tokenizer_folder
from trimtab.training.magic_pyramid.pruning import detach
from trimtab.training.magic_pyramid.settings import METHOD
from trimtab.training.profiled import write_profile

if TYPE_CHECKING:
    from trimtab.training.magic_pyramid.pyramid import Pyramid

RECORD = f"{METHOD}.json"


def write_result(pyramid: Pyramid, checkpoint: Checkpoint, record: dict[str, Any], job: Job, out: Path) -> None:
    """Write a Hugging Face directory of the tuned classifier, with its Profile.

    The Profile is what `trimtab calibrate` would measure of the new model on the training data, and what was learned.

    Args:
        record: of the training.
        job: its recipe, if there is one, says how to calibrate and for which passes.
    """
    with new_folder(out) as part:
        save_tuned(pyramid, checkpoint, record, part)
        write_profile(part, job, METHOD, record, learned_tensors(pyramid, record))


def save_tuned(pyramid: Pyramid, checkpoint: Checkpoint, record: dict[str, Any], folder: Path) -> None:
    """Fill `folder` with the tuned classifier.

    What sentence-transformers does behind an encoder is none of the classifier's; what it does to texts stays.
    """
    detach(pyramid.model)
    old = open_tokenizer_folder(checkpoint)
    without = ("modules.json", "config_sentence_transformers.json", *TRANSFORMER_CONFIGS)
    save_model(pyramid.model, old, record, RECORD, folder, without=without if checkpoint.pooling is not None else ())
    read_preparation(old).write(folder)


def learned_tensors(pyramid: Pyramid, record: dict[str, Any]) -> dict[str, np.ndarray]:
    """`thresholds` [layers] if some were learned, and `exit.<layers before it>.<parameter>` if exits were; float32.

    The last Linear of an exit is divided by its temperature.
    """
    tensors: dict[str, np.ndarray] = {}
    if pyramid.prunes:
        tensors["thresholds"] = pyramid.pruning.thresholds.detach().cpu().numpy()
    if "exits" in record["stages"]:
        for (number, leave), temperature in zip(pyramid.exits.items(), record["temperatures"], strict=True):
            for name, parameter in leave.named_parameters():
                scale = temperature if name.startswith("out.") else 1.0
                tensors[f"exit.{number}.{name}"] = parameter.detach().cpu().numpy() / np.float32(scale)
    return tensors


def summary(record: dict[str, Any], out: Path) -> str:
    """One sentence on how the model does on the held-out samples."""
    parts = [f"accuracy on held-out samples {record['accuracy']:.4f} (before {record['history'][0]['accuracy']:.4f})"]
    if "kept" in record:
        parts.append(f"{np.mean(record['kept']):.0%} of the tokens stay")
    if "exits" in record:
        parts.append(f"exits {' '.join(f'{share:.3f}' for share in record['exits'])}")
    return f"{', '.join(parts)}; the model is in {out}, with its Profile {PROFILE}"
