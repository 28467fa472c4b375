"""Profiles that a compile measured are stored in the cache, so that an interrupted compile does not measure again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.cache import entry
from trimtab.compiler.calibrate import calibrate
from trimtab.compiler.data import Dataset, read_data
from trimtab.compiler.recipe import Calibration
from trimtab.compiler.sources import Source
from trimtab.passes.errors import BuildError, DataError, ProfileError
from trimtab.passes.hashing import hash_bytes
from trimtab.passes.needs import DEFAULT, Need, to_measure
from trimtab.passes.profile import Profile

log = logging.getLogger(__name__)


def measured_profile(
    source: Source,
    dataset: Dataset,
    options: Calibration,
    *,
    needs: Iterable[Need] = DEFAULT,
    progress: Callable[[str, int, int], None] | None = None,
    again: bool = False,
) -> Profile:
    """The Profile of `source` on `dataset`: from the cache if it was measured before, else measured now.

    Args:
        needs: the needs of the passes that use the Profile.
        again: measure even if the cache has the Profile.
    """
    measured_needs = to_measure(needs)
    parts = [*source.hashes, source.tokenizer_hashes, dataset.sha256, options.model_dump(), package_versions()]
    parts.append(sorted(map(repr, measured_needs)))
    measured: list[Profile] = []

    def make(part: Path) -> None:
        profile = calibrate(source, dataset, needs=measured_needs, **options.model_dump(), progress=progress)
        if dataset.arrays is None and read_data(dataset.path).sha256 != dataset.sha256:
            raise DataError(f"{dataset.path}: changed while the model was calibrated on it", hint="compile again")
        measured.append(profile)
        profile.save(part)

    try:
        path = entry("profiles", f"{hash_bytes(json.dumps(parts, sort_keys=True))}.safetensors", make, again=again)
    except (BuildError, ProfileError) as error:
        if not measured:
            raise
        log.warning("the profile cannot be stored in the cache: %s", error)
    return measured[0] if measured else Profile.load(path)


def profile_digest(profile: Profile) -> str:
    """A hash of all that passes can read from a Profile."""
    digest = hashlib.sha256(profile.info.model_dump_json().encode())
    for name in sorted(profile.tensors):
        tensor = np.ascontiguousarray(profile.tensors[name])
        digest.update(f"{name}{tensor.dtype}{tensor.shape}".encode())
        digest.update(tensor.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
