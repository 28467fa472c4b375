"""Small JSON files that carry their own hash: what was damaged reads as if it were not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimtab.passes.hashing import hash_bytes


def write_sealed(path: Path, content: Any) -> None:
    """Write `content` whole or not at all, under a line with the hash of the text.

    What two processes write at once may get mixed; it then reads as if it were not there.
    """
    text = json.dumps(content, sort_keys=True, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")  # one name, so that killed processes leave one file at most
    part.write_text(f"{hash_bytes(text)}\n{text}", encoding="utf-8")
    part.replace(path)


def read_sealed(path: Path) -> Any:
    """The content; None where the file is missing, damaged or not readable."""
    try:
        seal, _, text = path.read_text(encoding="utf-8").partition("\n")
        return json.loads(text) if seal == hash_bytes(text) else None
    except (OSError, ValueError):
        return None
