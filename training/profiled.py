"""Writes the Profile of a tuned model into its folder: calibration statistics of the new model, and learned tensors."""

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
    """Write `profile.safetensors` into the folder of a new model.

    The Profile has the statistics that `trimtab calibrate` measures on the training data, the tensors that `method`
    learned, and the tensors that other methods learned for the original model.

    Args:
        job: the job. Its recipe, if any, sets calibration options and passes.
        record: record of the training, stored in the Profile's metadata.
        tensors: the learned tensors.
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
