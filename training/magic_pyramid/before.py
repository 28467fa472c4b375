"""What an earlier run left in the folder of the model: training goes on from there."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from trimtab.compiler.sources import open_source
from trimtab.passes.errors import ProfileError
from trimtab.passes.profile import PROFILE, Profile, read_info

METHOD = "magic-pyramid"

log = logging.getLogger(__name__)


def learned_before(folder: Path) -> bool:
    """Whether the Profile in a model's folder says that this method learned something.

    Raises:
        ProfileError: it is damaged.
    """
    return (folder / PROFILE).is_file() and METHOD in read_info(folder / PROFILE).learned


def load_learned(folder: Path) -> Mapping[str, np.ndarray]:
    """Thresholds and exits as the Profile in a model's folder has them; none if it is damaged or of other weights."""
    try:
        if not learned_before(folder):
            return {}
        profile = Profile.load(folder / PROFILE)
    except ProfileError as error:
        log.warning("magic-pyramid: training does not go on from %s", error.message)
        return {}
    if profile.info.model != open_source(folder).fingerprint:
        log.warning("magic-pyramid: training does not go on from %s: it is of another model", folder / PROFILE)
        return {}
    return profile.learned(METHOD)
