"""trimtab's cache. One process at a time makes an entry; an entry is stored whole and verified when it is read."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from trimtab.compiler.caching.record import describe, fault, record_path
from trimtab.compiler.caching.sealed import write_sealed
from trimtab.passes.errors import BuildError
from trimtab.passes.os_errors import blames, reason, remedy

log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ELSEWHERE = "set TRIMTAB_CACHE to a folder that can be written"
_PART = ".part"


def cache_dir() -> Path:
    """$TRIMTAB_CACHE, else $XDG_CACHE_HOME/trimtab, else ~/.cache/trimtab. The folder is created if it is missing.

    Raises:
        BuildError: the folder cannot be created or written.
    """
    named = os.environ.get("TRIMTAB_CACHE")
    path = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab"
    existing = next((each for each in (path, *path.parents) if each.exists()), path)
    if existing.exists() and not existing.is_dir():
        raise BuildError(
            f"cache folder {path}: {existing} is a file, not a folder",
            hint="set TRIMTAB_CACHE to a folder, or remove that file",
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(
            f"cache folder {path}: cannot be created ({reason(error)})", hint=_hint(error, path)
        ) from error
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise BuildError(f"cache folder {path}: cannot be read and written", hint=_ELSEWHERE)
    return path.resolve()


def entry(kind: str, name: str, make: Callable[[Path], object], *, again: bool = False) -> Path:
    """The file or folder `name` of `kind`: the cached one if every byte is as it was written, else a new one.

    If several processes ask for the same entry, one makes it and the others wait. An entry that is damaged,
    truncated or incomplete, or has extra files, is logged and made again.

    Args:
        kind: subfolder of the cache.
        name: the cache key, a hash of all that the content depends on; for a file, with its suffix.
        make: called with a path that does not exist yet; writes the file, or creates and fills the folder.
        again: make the entry even if the cached one is sound.

    Raises:
        BuildError: the cache cannot be written.
    """
    path = cache_dir() / kind / name
    if not again and fault(cache_dir(), kind, name) is None:
        return path
    with _writing(path), _locked(path):
        reason = None if again else fault(cache_dir(), kind, name)
        if not again and reason is None:
            return path  # another process has made the entry in the meantime
        if os.path.lexists(path) and not again:
            log.warning("cache: %s: %s; it is made again", path, reason)
        with _part_of(path) as part_path:
            make(part_path)
            _store(kind, name, part_path, path)
    return path


def is_sound(path: Path) -> bool:
    """Whether `path` belongs to an entry in which every byte is as it was written."""
    try:
        kind, name = path.resolve().relative_to(cache_dir()).parts[:2]
    except ValueError:
        return False
    return fault(cache_dir(), kind, name) is None


@contextmanager
def part(kind: str) -> Iterator[Path]:
    """A path for content whose cache key is known only after it is written; whatever is there afterwards is removed.

    Raises:
        BuildError: the cache cannot be written.
    """
    path = cache_dir() / kind / f"unnamed-{secrets.token_hex(8)}"
    with _writing(path), _locked(path), _part_of(path) as part_path:
        yield part_path


@contextmanager
def updated(kind: str, name: str) -> Iterator[Path]:
    """The path of a file that a library reads and changes in place in the body. A damaged file is removed first.

    Several processes may update the file at once, if the library permits that.

    Raises:
        BuildError: the cache cannot be written.
    """
    path = cache_dir() / kind / name
    with _writing(path), _locked(path):
        reason = fault(cache_dir(), kind, name)
        if reason is not None and os.path.lexists(path):
            log.warning("cache: %s: %s; it is started again", path, reason)
            _remove(path)
    yield path
    with _writing(path), _locked(path):
        if path.is_file():
            write_sealed(record_path(cache_dir(), kind, name), describe(kind, name, path))


def _store(kind: str, name: str, part_path: Path, path: Path) -> None:
    """Move the finished `part_path` to `path`. If the process is killed in between, the entry has no record."""
    content = describe(kind, name, part_path)
    record_path(cache_dir(), kind, name).unlink(missing_ok=True)
    if part_path.is_dir() or path.is_dir():
        _remove(path)
    part_path.replace(path)
    write_sealed(record_path(cache_dir(), kind, name), content)


@contextmanager
def _part_of(path: Path) -> Iterator[Path]:
    """A temporary path next to `path`, for the holder of its lock. Files of killed processes are removed first."""
    for left in path.parent.glob(f"*{_PART}"):
        stem = left.name.removesuffix(_PART)
        owner = path.parent / (stem.rpartition(".")[0] or stem)
        with suppress(OSError):  # a living process holds its lock
            if owner == path:
                _remove(left)
            else:
                with _locked(owner, timeout=0):
                    _remove(left)
    # The name is random, because a child of a killed process may still write to the old one.
    part_path = path.with_name(f"{path.name}.{secrets.token_hex(4)}{_PART}")
    try:
        yield part_path
    finally:
        _remove(part_path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold the lock for writing `path`. filelock tries again if the lock file was removed after it was opened.

    Raises:
        TimeoutError: another process held the lock for `timeout` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f"{path.name}.lock")
    with FileLock(file, timeout=timeout):
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn file-system errors below the folder of `path` into a BuildError."""
    try:
        yield
    except OSError as error:
        nameless = error.filename is None and error.errno in _FULL
        if not nameless and (error.filename is None or not blames(error, path.parent)):
            raise
        raise BuildError(
            f"cache folder {path.parent}: cannot be written ({reason(error)})", hint=_hint(error, path.parent)
        ) from error


def _hint(error: OSError, folder: Path) -> str:
    """The remedy for an error while writing to the cache."""
    return f"{remedy(error, folder)} (TRIMTAB_CACHE)" if error.errno in _FULL else _ELSEWHERE
