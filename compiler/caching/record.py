"""The record of a cache entry: size and hash of every file in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimtab.compiler.caching.sealed import read_sealed
from trimtab.compiler.caching.stamp import Stamp, is_settled, read_stamp
from trimtab.passes.hashing import hash_file

_verified: dict[Path, dict[str, Stamp]] = {}
"""Entries that this process has verified, with the stamps of their files: a file with another stamp is read again."""


def record_path(root: Path, kind: str, name: str) -> Path:
    """The path of an entry's record in the cache `root`; outside the entry, which contains only its own files."""
    return root / "records" / kind / f"{name}.json"


def describe(kind: str, name: str, path: Path) -> dict[str, Any]:
    """The record for the file or folder `path`, which will become the entry `name`."""
    return {"entry": [kind, name], "files": {inside: list(_describe(file)) for inside, file in _files(path)}}


def fault(root: Path, kind: str, name: str) -> str | None:
    """The fault of an entry; None if it is sound. Every byte of an entry is read, once in each process."""
    path = root / kind / name
    if not os.path.lexists(path):
        return "it is missing"
    try:
        stamps = {inside: read_stamp(file, follow=False) for inside, file in _files(path)}
        if _verified.get(path) == stamps:
            return None
        expected = read_sealed(record_path(root, kind, name))
        if not isinstance(expected, dict) or expected.get("entry") != [kind, name]:
            return "the record of its hashes is missing or damaged"
        files = dict(_files(path))
        if set(files) != set(expected["files"]):
            return "files are missing or were added"
        settled = all(is_settled(stamp) for stamp in stamps.values())
        for inside, file in files.items():
            size, digest = expected["files"][inside]
            if _size(file) != size or list(_describe(file)) != [size, digest]:
                return f"{inside} is not the file that was written" if inside != "." else "it was altered or truncated"
        if settled:
            _verified[path] = stamps
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """Every file and link of an entry, with its name in the entry; "." for an entry that is one file."""
    if path.is_symlink() or not path.is_dir():
        yield ".", path
        return
    for folder, subfolders, names in os.walk(path):
        links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
        for name in sorted([*names, *links]):
            file = Path(folder, name)
            yield file.relative_to(path).as_posix(), file


def _describe(file: Path) -> tuple[int, str]:
    """Size and hash of a file; for a link, which is not followed, its target."""
    if file.is_symlink():
        return 0, f"link to {os.readlink(file)}"
    return _size(file), hash_file(file) if file.is_file() else "no file"  # reading a pipe would wait for its writer


def _size(file: Path) -> int:
    return file.lstat().st_size if file.is_file() and not file.is_symlink() else 0
