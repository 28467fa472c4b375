"""The folder of a tuned model gets its Profile: what calibration measures of the new model, and what was learned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.compiler.profile_cache import measured_profile
from trimtab.compiler.recipe import Calibration
from trimtab.compiler.sources import open_source
from trimtab.passes.needs import DEFAULT
from trimtab.passes.profile import PROFILE, Profile
from trimtab.training.before import learned_by_others
from trimtab.training.contract import Job


def write_profile(
    folder: Path, job: Job, method: str, record: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """Write `profile.safetensors` into the folder of a new model: what `trimtab calibrate` would measure of it on the
    training data, what `method` learned, and what other methods had learned for the model that it began with.

    Args:
        job: its recipe, if there is one, says how to calibrate and for which passes.
        record: of the training, kept in the Profile's metadata.
        tensors: what was learned.
    """
    calibration = job.recipe.calibration if job.recipe is not None else Calibration()
    needs = DEFAULT | (job.recipe.needs if job.recipe is not None else frozenset())
    source = open_source(folder)
    measured = measured_profile(source, job.dataset, calibration, needs=needs, progress=job.progress)
    records, others = learned_by_others(Path(job.model), method, source.fingerprint)
    learned = measured.info.learned | records | {method: dict(record)}
    named = {f"learned.{method}.{name}": value for name, value in tensors.items()}
    info = measured.info.model_copy(update={"learned": learned})
    Profile(info, measured.tensors | others | named).save(folder / PROFILE)
