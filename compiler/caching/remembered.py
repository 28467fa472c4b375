"""Stored hashes of large files: a file whose stamp has not changed is not read again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trimtab.compiler.cache import cache_dir
from trimtab.compiler.caching.sealed import read_sealed, write_sealed
from trimtab.compiler.caching.stamp import Stamp, is_settled, read_stamp
from trimtab.passes.errors import BuildError
from trimtab.passes.hashing import hash_bytes, hash_file

log = logging.getLogger(__name__)

_WORTH = 1 << 24  # minimum bytes of files whose hash is stored on disk; fewer are read as fast as the stored hash

Reading = Callable[[], tuple[Sequence[Path], Callable[[], str]]]
"""A function that returns the other files on which the value depends, and a function that computes the value."""

_memory: dict[tuple[str, Path], dict[str, Any]] = {}


def file_hash(path: Path) -> str:
    """blake3 of a whole file. The file is read only if it changed since it was last hashed."""
    return remembered("blake3", path, lambda: ((), lambda: hash_file(path)))


def remembered(what: str, path: Path, read: Reading) -> str:
    """A value computed from `path` and other files, such as a hash; computed only if one of them changed.

    The last value of each (what, path) is stored in memory and, if the files are large, in the cache. It is valid while
    the stamps of all files are the same, and it is stored only if all files were settled before they were read. A
    change through a memory map on a file system that does not date it (tmpfs) is not noticed.

    Args:
        what: names the value and the version of its computation.
        path: the file that determines which other files are read.
        read: called if the value has to be computed.
    """
    path = path.resolve()
    stored = _memory.get((what, path))
    if stored is None or not _is_current(stored):
        stored = _read(what, path)
    if stored is not None:
        _memory[what, path] = stored
        return str(stored["value"])
    stamps = {str(path): read_stamp(path)}
    others, compute = read()
    # Links are not resolved: a link may lead to another file the next time.
    stamps |= {str(other): read_stamp(other) for other in (each.absolute() for each in others)}
    settled = all(is_settled(stamp) for stamp in stamps.values())
    value = compute()
    stored = {"what": what, "path": str(path), "files": {name: list(stamp) for name, stamp in stamps.items()}}
    stored["value"] = value
    if settled and _is_current(stored):
        _memory[what, path] = stored
        if sum(stamp.size for stamp in stamps.values()) >= _WORTH:
            _write(what, path, stored)
    return value


def _is_current(stored: dict[str, Any]) -> bool:
    """Whether no file has changed since `stored` was written."""
    try:
        return all(read_stamp(Path(name)) == Stamp(*stamp) for name, stamp in stored["files"].items())
    except OSError:
        return False


def _stored_path(what: str, path: Path) -> Path:
    return cache_dir() / "stamps" / f"{hash_bytes(what, str(path))[:32]}.json"


def _read(what: str, path: Path) -> dict[str, Any] | None:
    try:
        stored = read_sealed(_stored_path(what, path))
    except BuildError:
        return None
    matches = isinstance(stored, dict) and (stored.get("what"), stored.get("path")) == (what, str(path))
    return stored if matches and _is_current(stored) else None


def _write(what: str, path: Path, stored: dict[str, Any]) -> None:
    """Store a value. If the cache cannot be written, the only cost is that files are hashed again."""
    try:
        write_sealed(_stored_path(what, path), stored)
    except (OSError, BuildError) as error:
        log.debug("the hash of %s cannot be stored: %s", path, error)
