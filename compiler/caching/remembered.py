"""Hashes of large files, kept: a file whose stamp is that of the last time is not read again."""

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

_WORTH = 1 << 24  # bytes of files whose hash is kept on disk; fewer are read in the time that looking it up takes

Reading = Callable[[], tuple[Sequence[Path], Callable[[], str]]]
"""A function that tells which other files the value depends on, and how to compute it."""

_memory: dict[tuple[str, Path], dict[str, Any]] = {}


def file_hash(path: Path) -> str:
    """blake3 of a whole file, which is read only if it changed since it was last hashed."""
    return remembered("blake3", path, lambda: ((), lambda: hash_file(path)))


def remembered(what: str, path: Path, read: Reading) -> str:
    """A value computed from `path` and other files, such as a hash; computed only if one of them changed.

    The last value of each (what, path) is kept in memory and, where the files are large, in the cache. It is believed
    while the stamps of all files are the same, and it is kept only if they all were settled before they were read. A
    change through a memory map that a file system does not date (tmpfs) goes unnoticed.

    Args:
        what: names the value, and the version of how it is computed.
        path: the file that decides which others are read.
        read: called when the value has to be computed.
    """
    path = path.resolve()
    kept = _memory.get((what, path))
    if kept is None or not _holds(kept):
        kept = _read(what, path)
    if kept is not None:
        _memory[what, path] = kept
        return str(kept["value"])
    stamps = {str(path): read_stamp(path)}
    others, compute = read()
    # Not resolved: a link may lead to another file the next time.
    stamps |= {str(other): read_stamp(other) for other in (each.absolute() for each in others)}
    settled = all(is_settled(stamp) for stamp in stamps.values())
    value = compute()
    kept = {"what": what, "path": str(path), "files": {name: list(stamp) for name, stamp in stamps.items()}}
    kept["value"] = value
    if settled and _holds(kept):
        _memory[what, path] = kept
        if sum(stamp.size for stamp in stamps.values()) >= _WORTH:
            _write(what, path, kept)
    return value


def _holds(kept: dict[str, Any]) -> bool:
    """Whether no file has changed since."""
    try:
        return all(read_stamp(Path(name)) == Stamp(*stamp) for name, stamp in kept["files"].items())
    except OSError:
        return False


def _file(what: str, path: Path) -> Path:
    return cache_dir() / "stamps" / f"{hash_bytes(what, str(path))[:32]}.json"


def _read(what: str, path: Path) -> dict[str, Any] | None:
    try:
        kept = read_sealed(_file(what, path))
    except BuildError:
        return None
    known = isinstance(kept, dict) and (kept.get("what"), kept.get("path")) == (what, str(path))
    return kept if known and _holds(kept) else None


def _write(what: str, path: Path, kept: dict[str, Any]) -> None:
    """A cache that cannot be written costs the time of hashing again, nothing else."""
    try:
        write_sealed(_file(what, path), kept)
    except (OSError, BuildError) as error:
        log.debug("the hash of %s cannot be kept: %s", path, error)
