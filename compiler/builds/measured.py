"""measured.json: what `trimtab validate`, `bench` and `cost` found of a build. Nothing that runs reads it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

log = logging.getLogger(__name__)

MEASURED = Path("measured.json")


class Measured(BaseModel):
    """What was measured of a build since it was compiled.

    Attributes:
        manifest: sha256 of the manifest of that build.
        quality, speed, cost: found by `trimtab validate`, `trimtab bench` and `trimtab cost`; empty before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    manifest: str
    quality: dict[str, Any] = {}
    speed: dict[str, Any] = {}
    cost: dict[str, Any] = {}


def read_measured(folder: Path, manifest_hash: str) -> Measured:
    """What was measured of the build in `folder`. What was measured of another build, or is damaged, does not count."""
    path = folder / MEASURED
    nothing = Measured(manifest=manifest_hash)
    try:
        measured = Measured.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return nothing
    except (OSError, ValidationError) as error:
        log.warning("%s: cannot be read, so it does not count (%s)", path, " ".join(str(error).split())[:200])
        return nothing
    if measured.manifest != manifest_hash:
        log.warning("%s: was measured of another build, so it does not count", path)
        return nothing
    return measured
