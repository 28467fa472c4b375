"""Builds whose manifests were changed, with the right hash beside them, as someone would who knows the format."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from trimtab.compiler.builds.manifest import HASH, NAME, hash_line


def seal(folder: Path, **changes: Any) -> str:
    """Change fields of the manifest in `folder` and write its new hash, which is returned."""
    path = folder / NAME
    text = json.dumps(json.loads(path.read_text()) | changes)
    path.write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / HASH).write_text(hash_line(digest))
    return digest


def listed(folder: Path) -> dict[str, dict[str, Any]]:
    """Entries of the files that are there now."""
    files = json.loads((folder / NAME).read_text())["files"]
    return {name: entry(folder / name) for name in files if (folder / name).is_file()}


def entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
