"""Small JSON files that contain their own hash: a damaged file reads as a missing one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimtab.passes.hashing import hash_bytes


def write_sealed(path: Path, content: Any) -> None:
    """Write `content` whole or not at all, after a line with the hash of the text.

    If two processes write at the same time, the texts may mix; the file then reads as a missing one.
    """
    text = json.dumps(content, sort_keys=True, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")  # a fixed name, so that killed processes leave at most one file
    part.write_text(f"{hash_bytes(text)}\n{text}", encoding="utf-8")
    part.replace(path)


def read_sealed(path: Path) -> Any:
    """The content; None if the file is missing, damaged or unreadable."""
    try:
        seal, _, text = path.read_text(encoding="utf-8").partition("\n")
        return json.loads(text) if seal == hash_bytes(text) else None
    except (OSError, ValueError):
        return None
