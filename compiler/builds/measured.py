"""measured.json: the results of `trimtab validate`, `bench` and `cost` for a build. Engines never read it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

log = logging.getLogger(__name__)

MEASURED = Path("measured.json")


class Measured(BaseModel):
    """Measurements of a build since it was compiled.

    Attributes:
        manifest: sha256 of the build's manifest.
        quality, speed, cost: results of `trimtab validate`, `trimtab bench` and `trimtab cost`; empty before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    manifest: str
    quality: dict[str, Any] = {}
    speed: dict[str, Any] = {}
    cost: dict[str, Any] = {}


def read_measured(folder: Path, manifest_hash: str) -> Measured:
    """The measurements of the build in `folder`; none if the file is damaged or belongs to another build."""
    path = folder / MEASURED
    empty = Measured(manifest=manifest_hash)
    try:
        measured = Measured.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return empty
    except (OSError, ValidationError) as error:
        log.warning("%s: cannot be read, so it is ignored (%s)", path, " ".join(str(error).split())[:200])
        return empty
    if measured.manifest != manifest_hash:
        log.warning("%s: was measured on another build, so it is ignored", path)
        return empty
    return measured
