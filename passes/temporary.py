"""Temporary folders that end with their process. If a process is killed, the next process removes its folders."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

_PREFIX, _SUFFIX = "trimtab-", ".tmp"


@contextmanager
def temporary_folder(purpose: str, parent: Path | None = None) -> Iterator[Path]:
    """Create a folder in `parent`, and remove it after the body.

    The process locks the folder. The system releases the lock when the process ends, however it ends.

    Args:
        purpose: a word in the folder's name.
        parent: a folder that exists; by default the system's folder of temporary files (TMPDIR). A folder beside an
            output is on the output's disk, so that a rename moves its content there.
    """
    place = (parent or Path(tempfile.gettempdir())).absolute()
    _remove_left(place)
    path, lock = _claim(purpose, place)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _claim(purpose: str, parent: Path) -> tuple[Path, int]:
    """A new folder in `parent` and the open handle with its lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{purpose}-", suffix=_SUFFIX, dir=parent))
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another process removed it as an abandoned folder before it was locked
            continue
        with suppress(OSError):  # on a file system without locks, no other process gets a lock either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_dir():
            return path, lock
        os.close(lock)


@lru_cache  # once in a process, for each folder
def _remove_left(parent: Path) -> None:
    """Remove the folders of this user in `parent` whose processes have ended."""
    for path in parent.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError):  # locked, of another user, or gone
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(handle).st_uid == os.getuid():
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(handle)
