"""Profiles that a compile measured, kept in the cache, so that an interrupted compile need not measure again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable

import numpy as np

from trimtab.compiler.builds.build import hash_file
from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.cache import cache_dir
from trimtab.compiler.calibrate import calibrate
from trimtab.compiler.data import Dataset
from trimtab.compiler.recipe import Calibration
from trimtab.compiler.sources import Source
from trimtab.passes.errors import ProfileError
from trimtab.passes.profile import Profile

log = logging.getLogger(__name__)


def measured_profile(
    source: Source,
    dataset: Dataset,
    options: Calibration,
    *,
    progress: Callable[[str, int, int], None] | None = None,
    again: bool = False,
) -> Profile:
    """The Profile of `source` on `dataset`: from the cache where the same was measured before, else measured now.

    Args:
        again: measure in any case.
    """
    parts = [source.fingerprint, hash_file(source.onnx), dataset.sha256, options.model_dump(), package_versions()]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    path = cache_dir() / "profiles" / f"{key}.safetensors"
    if path.is_file() and not again:
        try:
            found = Profile.load(path)
            found.check(source.fingerprint)
            return found
        except ProfileError as error:
            log.warning("%s; measuring anew", error)
    profile = calibrate(source, dataset, **options.model_dump(), progress=progress)
    part = path.with_name(f"{key}.{os.getpid()}.safetensors")  # of this process: two may measure the same at a time
    try:
        path.parent.mkdir(exist_ok=True)
        profile.save(part)
        part.replace(path)
    except (ProfileError, OSError) as error:
        part.unlink(missing_ok=True)
        log.warning("the profile cannot be kept in the cache: %s", error)
    return profile


def profile_digest(profile: Profile) -> str:
    """A hash of all that passes can see of a Profile."""
    digest = hashlib.sha256(profile.info.model_dump_json().encode())
    for name in sorted(profile.tensors):
        tensor = np.ascontiguousarray(profile.tensors[name])
        digest.update(f"{name}{tensor.dtype}{tensor.shape}".encode())
        digest.update(tensor.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
