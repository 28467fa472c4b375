"""Where trimtab keeps what it can make again: exported models, Profiles, dense models and engines."""

from __future__ import annotations

import os
from pathlib import Path

from trimtab.passes.errors import BuildError


def cache_dir() -> Path:
    """$TRIMTAB_CACHE, else $XDG_CACHE_HOME/trimtab, else ~/.cache/trimtab; made if it is missing.

    Raises:
        BuildError: it cannot be made or written.
    """
    named = os.environ.get("TRIMTAB_CACHE")
    path = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab"
    hint = "set TRIMTAB_CACHE to a folder that can be written"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"cache folder {path}: cannot be made ({error.strerror})", hint=hint) from error
    if not os.access(path, os.W_OK):
        raise BuildError(f"cache folder {path}: cannot be written", hint=hint)
    return path.resolve()
