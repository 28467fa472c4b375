"""Results of earlier trainings in the model's folder. Training continues from them and keeps those of other methods."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.compiler.sources import open_source
from trimtab.passes.errors import ProfileError
from trimtab.passes.profile import PROFILE, Profile, read_info
from trimtab.training import METHOD_NAMES, trainer_class

log = logging.getLogger(__name__)


def learned_before(folder: Path, method: str) -> bool:
    """Whether the Profile in a model's folder has weights learned by `method`.

    Raises:
        ProfileError: the Profile is damaged.
    """
    return (folder / PROFILE).is_file() and method in read_info(folder / PROFILE).learned


def load_learned(folder: Path, *methods: str) -> list[Mapping[str, np.ndarray]]:
    """The tensors that each of `methods` learned, from the Profile in the model's folder. They are empty if the Profile
    is damaged or belongs to another model.

    Args:
        methods: the method that continues, and other methods whose tensors it reads.
    """
    nothing: list[Mapping[str, np.ndarray]] = [{} for _ in methods]
    try:
        if not any(learned_before(folder, method) for method in methods):
            return nothing
        profile = Profile.load(folder / PROFILE)
    except ProfileError as error:
        log.warning("%s: training does not go on from %s", methods[0], error.message)
        return nothing
    if profile.info.model != open_source(folder).fingerprint:
        log.warning("%s: training does not go on from %s: it is of another model", methods[0], folder / PROFILE)
        return nothing
    return [profile.learned(method) for method in methods]


def learned_by_others(
    folder: Path, method: str, weights: str
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:  # fmt: skip
    """Records and tensors of other methods for the model in `folder` that stay useful after `method` has tuned it.

    Warns about tensors that cannot be kept, and about tensors learned for weights that have changed since.

    Args:
        weights: fingerprint of the new model.

    Returns:
        Method → its record; and tensors by their names in a Profile.
    """
    path = folder / PROFILE
    try:
        info = read_info(path) if path.is_file() else None
        others = [name for name in info.learned if name != method and _refit(name)] if info is not None else []
        profile = Profile.load(path) if others else None
    except ProfileError as error:
        log.warning("%s: what other methods learned is not kept: %s", method, error.message)
        return {}, {}
    if info is None or profile is None:
        return {}, {}
    if info.model != open_source(folder).fingerprint:
        log.warning("%s: what %s learned is not kept: %s is of another model", method, " and ".join(others), path)
        return {}, {}
    if info.model != weights:
        for name in others:
            log.warning(
                "%s: the new Profile keeps what %s learned for the weights of before; `trimtab train NEW_MODEL %s` "
                "fits it to the new ones", method, name, _refit(name),
            )  # fmt: skip
    tensors = {f"learned.{name}.{key}": value for name in others for key, value in profile.learned(name).items()}
    return {name: dict(info.learned[name]) for name in others}, tensors


def _refit(name: str) -> str | None:
    return trainer_class(name).refit if name in METHOD_NAMES else None
