"""Where trimtab keeps what it can make again: made by one process at a time, stored whole, verified when it is read."""

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
    """$TRIMTAB_CACHE, else $XDG_CACHE_HOME/trimtab, else ~/.cache/trimtab; made if it is missing.

    Raises:
        BuildError: it cannot be made or written.
    """
    named = os.environ.get("TRIMTAB_CACHE")
    path = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab"
    in_the_way = next((each for each in (path, *path.parents) if each.exists()), path)
    if in_the_way.exists() and not in_the_way.is_dir():
        raise BuildError(
            f"cache folder {path}: {in_the_way} is a file, not a folder",
            hint="set TRIMTAB_CACHE to a folder, or remove that file",
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"cache folder {path}: cannot be made ({reason(error)})", hint=_hint(error, path)) from error
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise BuildError(f"cache folder {path}: cannot be read and written", hint=_ELSEWHERE)
    return path.resolve()


def entry(kind: str, name: str, make: Callable[[Path], object], *, again: bool = False) -> Path:
    """The file or folder `name` of `kind`: the one in the cache if every byte is as it was written, else a new one.

    Of several processes that ask for the same entry, one makes it and the others wait. An entry that is damaged,
    truncated or incomplete, or has files too many, is logged and made again.

    Args:
        kind: folder of the cache.
        name: what the content depends on, as a hash; a file has its suffix, too.
        make: called with a path where nothing is yet; writes the file, or makes and fills the folder.
        again: make it in any case.

    Raises:
        BuildError: the cache cannot be written.
    """
    path = cache_dir() / kind / name
    if not again and fault(cache_dir(), kind, name) is None:
        return path
    with _writing(path), _locked(path):
        reason = None if again else fault(cache_dir(), kind, name)
        if not again and reason is None:
            return path  # another process has made it by now
        if os.path.lexists(path) and not again:
            log.warning("cache: %s: %s; it is made again", path, reason)
        with _part_of(path) as made:
            make(made)
            _store(kind, name, made, path)
    return path


def is_sound(path: Path) -> bool:
    """Whether `path` is an entry, or a file of an entry, of which every byte is as it was written."""
    try:
        kind, name = path.resolve().relative_to(cache_dir()).parts[:2]
    except ValueError:
        return False
    return fault(cache_dir(), kind, name) is None


@contextmanager
def part(kind: str) -> Iterator[Path]:
    """A path for what has to be written before its name is known; whatever is there afterwards is removed.

    Raises:
        BuildError: the cache cannot be written.
    """
    path = cache_dir() / kind / f"unnamed-{secrets.token_hex(8)}"
    with _writing(path), _locked(path), _part_of(path) as made:
        yield made


@contextmanager
def updated(kind: str, name: str) -> Iterator[Path]:
    """The path of a file that a library reads and changes in place in the body; a damaged one is removed first.

    Several processes may update it at once, if the library permits that.

    Raises:
        BuildError: the cache cannot be written.
    """
    path = cache_dir() / kind / name
    with _writing(path), _locked(path):
        reason = fault(cache_dir(), kind, name)
        if reason is not None and os.path.lexists(path):
            log.warning("cache: %s: %s; it is begun again", path, reason)
            _remove(path)
    yield path
    with _writing(path), _locked(path):
        if path.is_file():
            write_sealed(record_path(cache_dir(), kind, name), describe(kind, name, path))


def _store(kind: str, name: str, made: Path, path: Path) -> None:
    """Put what was made in its place. Killed in between, it leaves an entry without a record, which is not sound."""
    content = describe(kind, name, made)
    record_path(cache_dir(), kind, name).unlink(missing_ok=True)
    if made.is_dir() or path.is_dir():
        _remove(path)
    made.replace(path)
    write_sealed(record_path(cache_dir(), kind, name), content)


@contextmanager
def _part_of(path: Path) -> Iterator[Path]:
    """A path beside `path`, of its lock's holder. What killed processes left there is removed first."""
    for left in path.parent.glob(f"*{_PART}"):
        stem = left.name.removesuffix(_PART)
        owner = path.parent / (stem.rpartition(".")[0] or stem)
        with suppress(OSError):  # a living process holds its lock
            if owner == path:
                _remove(left)
            else:
                with _locked(owner, timeout=0):
                    _remove(left)
    made = path.with_name(f"{path.name}.{secrets.token_hex(4)}{_PART}")  # a killed process's child may write on
    try:
        yield made
    finally:
        _remove(made)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold the right to write `path`. Whoever opened the lock file before it was removed tries again, as filelock does.

    Raises:
        TimeoutError: another process has held it for `timeout` seconds.
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
    """Turn failures of the file system below the folder of `path` into one clear error."""
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
    """What to do about an error of writing to the cache."""
    return f"{remedy(error, folder)} (TRIMTAB_CACHE)" if error.errno in _FULL else _ELSEWHERE
