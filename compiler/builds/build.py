"""Opening a build directory: verified, and read as one build even while another process replaces it.

A build is never changed in place: a compile writes another directory and swaps the two. So a reader that holds the
directory open and afterwards still finds it under the same name has read one build.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from trimtab.compiler.builds.contents import TOKENIZER, check_listing, check_references
from trimtab.compiler.builds.manifest import NAME, FileInfo, Manifest, is_build, read_manifest
from trimtab.compiler.builds.measured import Measured, read_measured
from trimtab.compiler.targets.base import MODEL
from trimtab.passes.errors import BuildError
from trimtab.passes.os_errors import unreadable

log = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")

_CHUNK = 1 << 20  # bytes hashed at a time, which fit a core's cache
_ATTEMPTS = 10  # to read a build that other processes keep replacing
_ABSENT_S = 5.0  # seconds that a build may be absent while a swap needs two renames
_POLL_S = 0.01


@dataclass(frozen=True)
class Build:
    """A finished build.

    Attributes:
        path: the directory.
        manifest: the description of the build.
        hash: sha256 of the manifest, which contains the hashes of all files: it identifies the whole build.
        reused: True if a compile found the build up to date and did nothing.
    """

    path: Path
    manifest: Manifest
    hash: str
    reused: bool = False

    @property
    def model(self) -> Path:
        """The compiled graph."""
        return self.path / MODEL

    @property
    def tokenizer(self) -> Path | None:
        """Folder with tokenizer.json, or None if the model has no tokenizer."""
        return self.path / TOKENIZER if self.files_in(TOKENIZER) else None

    @property
    def measured(self) -> Measured:
        """The results that `trimtab validate`, `bench` and `cost` recorded."""
        return read_measured(self.path, self.hash)

    def files_in(self, folder: Path) -> list[Path]:
        """Paths of the files that the manifest lists directly in `folder` of the build."""
        return [self.path / name for name in self.manifest.files if Path(name).parent == folder]

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Ensure that the directory holds this build while the body reads from it.

        Raises:
            BuildError: another process replaced the build, which also explains any error of the body.
        """
        with unchanged(self.path, self.hash):
            yield


def open_build(folder: Path | str, *, verify: bool = True, trusted_hash: str | None = None) -> Build:
    """Open a build directory.

    Args:
        verify: hash every file, instead of only checking that it exists with the right size.
        trusted_hash: sha256 that the manifest must have; every file is then hashed, whatever `verify` is.

    Raises:
        BuildError: not a build, of another format, damaged, or not the trusted build; names the damaged file.
    """
    return read_build(folder, lambda build: build, verify=verify, trusted_hash=trusted_hash)


def read_build(
    folder: Path | str,
    read: Callable[[Build], T],
    *,
    verify: bool = True,
    trusted_hash: str | None = None,
    discard: Callable[[T], None] | None = None,
) -> T:
    """The result of `read` on the build in `folder`. All files that `read` opens there belong to one build.

    If another process replaces the build meanwhile, the build is opened and read again.

    Args:
        verify, trusted_hash: as in `open_build`.
        discard: releases a result that was read from a replaced build.

    Raises:
        BuildError: as in `open_build`; or the build was replaced in every attempt.
    """
    folder = Path(folder)
    for _ in range(_ATTEMPTS):
        with _hold(folder) as is_there:
            try:
                build, marks = _open(folder, verify, trusted_hash)
                result = read(build)
                _check_marks(folder, marks)
            except Exception:
                if is_there():
                    raise
                continue
            if is_there():
                return result
        if discard is not None:
            discard(result)
    raise BuildError(
        f"{folder}: other processes replaced the build {_ATTEMPTS} times while it was loaded", hint="load it again"
    )


@contextmanager
def unchanged(folder: Path, manifest_hash: str) -> Iterator[None]:
    """Ensure that `folder` holds the build with this manifest while the body reads from it; see `Build.unchanged`."""
    replaced = BuildError(f"{folder}: another process has replaced the build that was loaded", hint="load it again")
    with _hold(folder) as is_there:
        if read_manifest(folder)[1] != manifest_hash:
            raise replaced
        try:
            yield
        except Exception as error:
            if is_there():
                raise
            raise replaced from error
        if not is_there():
            raise replaced


def of_one_build(function: Callable[Concatenate[Build, P], T]) -> Callable[Concatenate[Build, P], T]:
    """Decorator for functions that read from a build: an error if the build is replaced while they run."""

    @wraps(function)
    def run(build: Build, *args: P.args, **kwargs: P.kwargs) -> T:
        with build.unchanged():
            return function(build, *args, **kwargs)

    return run


def find_build(folder: Path, key: str) -> Build | None:
    """The build in `folder`, if its key is `key` and every file is intact; else None."""
    if not is_build(folder):
        return None
    try:
        if read_manifest(folder)[0].key != key:
            return None
        return replace(open_build(folder), reused=True)
    except BuildError as error:
        log.warning("%s; compiling it again", error.message)
        return None


def sha256_of(path: Path) -> str:
    """sha256 of a file, read in chunks."""
    with open(path, "rb", buffering=0) as file:
        return _hash(file.readinto)


def _hash(readinto: Callable[[memoryview], int | None]) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    while count := readinto(buffer):
        digest.update(buffer[:count])
    return digest.hexdigest()


def absolute(folder: Path | str) -> Path:
    """`folder` with links resolved, so that two names of one directory share its lock."""
    folder = Path(folder).expanduser().resolve()
    if folder.parent == folder:
        raise BuildError(f"{folder}: is the root of the file system", hint="give a directory of its own with -o")
    return folder


def check_outside(out: Path) -> None:
    """Refuse to write into a build: the next compile there replaces all of it.

    Raises:
        BuildError: `out` lies inside a build.
    """
    outer = next((folder for folder in out.absolute().parents if is_build(folder)), None)
    if outer is not None:
        raise BuildError(
            f"{out}: lies inside the build {outer}, and would be gone as soon as that is compiled again",
            hint="choose a directory outside of it",
        )


def sibling(out: Path, what: str) -> Path:
    """The hidden path next to `out` that writers use for `what`, such as "part" or "lock"."""
    return out.with_name(f".{out.name}.trimtab-{what}")


_Mark = tuple[int, int, int, int]
"""Device, inode, size and modification time of a file: they differ if another file takes its place."""


def _open(folder: Path, verify: bool, trusted_hash: str | None) -> tuple[Build, dict[str, _Mark]]:
    manifest, digest = read_manifest(folder)
    if trusted_hash is not None and digest != trusted_hash.strip().lower():
        raise BuildError(
            f"{folder / NAME}: its sha256 is {digest}, and {trusted_hash} is trusted",
            hint="this is not the build you trust, or it was compiled again since",
        )
    check_listing(folder, manifest)
    verify = verify or trusted_hash is not None
    marks = {name: _check_file(folder / name, info, verify) for name, info in manifest.files.items()}
    check_references(folder, manifest)
    return Build(folder, manifest, digest), marks


def _check_file(path: Path, info: FileInfo, verify: bool) -> _Mark:
    """Check that the file at `path` is the one that `info` describes."""
    try:
        if not path.is_file():
            raise BuildError(f"{path}: missing from the build", hint="compile it again")
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if status.st_size != info.bytes or (verify and _hash(file.readinto) != info.sha256):
                raise BuildError(f"{path}: damaged: it is not the file that was compiled", hint="compile it again")
    except OSError as error:
        raise unreadable(path, error, BuildError) from error
    return _mark(status)


def _mark(status: os.stat_result) -> _Mark:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _check_marks(folder: Path, marks: dict[str, _Mark]) -> None:
    """Check that the files are still those that were verified."""
    for name, mark in marks.items():
        try:
            same = _mark(os.stat(folder / name)) == mark
        except OSError:
            same = False
        if not same:
            raise BuildError(f"{folder / name}: changed while the build was loaded", hint="load it again")


@contextmanager
def _hold(folder: Path) -> Iterator[Callable[[], bool]]:
    """Hold the directory open, so that no other directory can get its inode.

    Yields:
        A function that returns whether `folder` still names this directory.
    """
    handle = _open_directory(folder)
    try:
        opened = os.fstat(handle)

        def is_there() -> bool:
            try:
                now = os.stat(folder)
            except OSError:
                return False
            return (now.st_dev, now.st_ino) == (opened.st_dev, opened.st_ino)

        yield is_there
    finally:
        os.close(handle)


def _open_directory(folder: Path) -> int:
    """A handle of the directory. While a writer is between the two renames of a swap, wait for the directory."""
    deadline = time.monotonic() + _ABSENT_S
    while (handle := _handle(folder)) is None:
        if not _is_being_replaced(folder):
            problem = "is a file, not a build directory" if os.path.exists(folder) else "no such build directory"
            raise BuildError(f"{folder}: {problem}", hint="make one with `trimtab compile`")
        if time.monotonic() > deadline:
            raise BuildError(
                f"{folder}: absent, because a compile ended while it replaced the build", hint="compile it again"
            )
        time.sleep(_POLL_S)
    return handle


def _handle(folder: Path) -> int | None:
    """A handle of the directory, or None if it does not exist."""
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(folder, error, BuildError) from error


def _is_being_replaced(folder: Path) -> bool:
    """Whether `folder`, absent a moment ago, exists now, or the old build is next to it under its temporary name."""
    path = folder.resolve()
    return bool(path.name) and (sibling(path, "old").is_dir() or path.is_dir())
