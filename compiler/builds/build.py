"""The build directory: written whole or not at all, by one process at a time, and verified when it is opened."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trimtab.compiler.builds.manifest import NAME, FileInfo, Manifest, is_build, read_manifest, write_text
from trimtab.compiler.builds.report import render
from trimtab.compiler.targets.base import MODEL
from trimtab.passes.errors import BuildError

log = logging.getLogger(__name__)

PROFILE = Path("profile.safetensors")
RECIPE = Path("recipe.yaml")
REPORT = Path("report.md")
TOKENIZER = Path("tokenizer")
_CHUNK = 1 << 24  # bytes hashed at a time
_UPDATE_WAIT_S = 30.0  # for another process that updates the same manifest


@dataclass(frozen=True)
class Build:
    """A finished build.

    Attributes:
        path: the directory.
        manifest: what it says of itself.
        reused: True where a compile found it up to date and did nothing.
    """

    path: Path
    manifest: Manifest
    reused: bool = False

    @property
    def model(self) -> Path:
        """The compiled graph."""
        return self.path / MODEL

    @property
    def tokenizer(self) -> Path | None:
        """Folder with tokenizer.json, or None where the model has none."""
        folder = self.path / TOKENIZER
        return folder if folder.is_dir() else None


def open_build(folder: Path | str, *, verify: bool = True) -> Build:
    """Open a build directory.

    Args:
        verify: hash every file, and not only look whether it is there.

    Raises:
        BuildError: not a build, of another format, or damaged; names the damaged file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BuildError(f"{folder}: no such build directory", hint="make one with `trimtab compile`")
    manifest = read_manifest(folder)
    for name, info in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise BuildError(f"{path}: missing from the build", hint="compile it again")
        if path.stat().st_size != info.bytes or (verify and hash_file(path) != info.sha256):
            raise BuildError(f"{path}: damaged: it is not the file that was compiled", hint="compile it again")
    return Build(folder, manifest)


def find_build(folder: Path, key: str) -> Build | None:
    """The build in `folder`, if it was made from the inputs that `key` stands for and is sound."""
    if not is_build(folder):
        return None
    try:
        if read_manifest(folder).key != key:
            return None
        return replace(open_build(folder), reused=True)
    except BuildError as error:
        log.warning("%s; compiling it anew", error.message)
        return None


def update_manifest(
    build: Build, *, quality: dict[str, Any] | None = None, speed: dict[str, Any] | None = None
) -> Build:
    """Record what was measured of `build`, in its manifest and its report. What is None stays as it was.

    Raises:
        BuildError: the build is gone, is being replaced, or cannot be written.
    """
    writer = BuildWriter(build.path)
    with writer.writing(), _lock(writer.out, timeout=_UPDATE_WAIT_S):
        changes = {key: value for key, value in (("quality", quality), ("speed", speed)) if value is not None}
        manifest = read_manifest(build.path).model_copy(update=changes)
        write_text(build.path / REPORT, render(manifest))
        files = manifest.files | {REPORT.as_posix(): _info(build.path / REPORT)}
        manifest = manifest.model_copy(update={"files": files})
        write_text(build.path / NAME, manifest.model_dump_json(indent=2))
    return Build(build.path, manifest)


class BuildWriter:
    """Context manager: a folder to write a build into, which takes the place of `out` on `commit`.

    It lies hidden beside `out`, on the same file system. Leaving without a commit, by an error or Ctrl-C, removes it
    and leaves `out` as it was; what a killed process left is removed by the next one.

    Raises:
        BuildError: `out` is something else than a build, is being written by another process, or cannot be written.
    """

    def __init__(self, out: Path | str) -> None:
        self.out = _absolute(out)
        self.folder = _sibling(self.out, "part")
        self._stack = ExitStack()

    def __enter__(self) -> BuildWriter:
        with self._stack, self.writing():
            _check_replaceable(self.out)
            self._stack.enter_context(_parents(self.out))
            with tempfile.TemporaryDirectory(prefix=".trimtab-", dir=self.out.parent):
                pass  # can be written; where it cannot, filelock may report a lock that is held
            self._stack.enter_context(_lock(self.out))
            _recover(self.out)
            shutil.rmtree(self.folder, ignore_errors=True)
            self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self.folder.mkdir()
            self._stack = self._stack.pop_all()  # nothing failed: what was entered stays so until __exit__
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn failures of the file system in the body, which writes the build, into one clear error."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            hint = "free some space, or choose another disk" if full else "choose a directory that you may write to"
            raise BuildError(f"{self.out}: cannot write the build ({error.strerror or error})", hint=hint) from error

    def commit(self, manifest: Manifest) -> Build:
        """Hash the files, add manifest and report, and put the whole in its place."""
        with self.writing():
            write_text(self.folder / REPORT, render(manifest))
            manifest = manifest.model_copy(update={"files": _describe(self.folder)})
            write_text(self.folder / NAME, manifest.model_dump_json(indent=2))
            _sync(self.folder)
            _check_replaceable(self.out)  # again: much time has passed
            _swap(self.folder, self.out)
        return Build(self.out, manifest)


def _check_replaceable(out: Path) -> None:
    """Refuse to write a build over anything but a build or an empty directory."""
    hint = "choose another directory, or remove this one yourself"
    if out.exists() and not out.is_dir():
        raise BuildError(f"{out}: exists and is not a directory", hint=hint)
    if out.is_dir() and any(out.iterdir()) and not is_build(out):
        raise BuildError(f"{out}: exists and is not a build, so it is left alone", hint=hint)


def _describe(folder: Path) -> dict[str, FileInfo]:
    """Hash and size of every file below `folder`."""
    return {path.relative_to(folder).as_posix(): _info(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _info(path: Path) -> FileInfo:
    return FileInfo(sha256=hash_file(path), bytes=path.stat().st_size)


def hash_file(path: Path) -> str:
    """sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _absolute(out: Path | str) -> Path:
    """`out` with links resolved, so that two ways to name one directory share its lock."""
    out = Path(out).expanduser().resolve()
    if out.parent == out:
        raise BuildError(f"{out}: is the root of the file system", hint="give a directory of its own with -o")
    return out


def _sibling(out: Path, what: str) -> Path:
    return out.with_name(f".{out.name}.trimtab-{what}")


@contextmanager
def _lock(out: Path, *, timeout: float = 0) -> Iterator[None]:
    """Hold the right to write `out`.

    The lock file is removed while it is held. Whoever opened it before then sees that it has no name any more and
    does not count it as a lock: filelock checks that.
    """
    path = _sibling(out, "lock")
    lock = FileLock(path, timeout=timeout)
    try:
        lock.acquire()
    except Timeout as error:
        raise BuildError(
            f"{out}: another process is writing this build", hint="wait for it to end, or choose another directory"
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def _parents(out: Path) -> Iterator[None]:
    """Make the folders above `out`, and remove them again if nothing came of it."""
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        if not out.exists():
            for folder in missing:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()


def _recover(out: Path) -> None:
    """Undo what a process that was killed between the two renames of `_swap` left."""
    old = _sibling(out, "old")
    if old.exists() and not out.exists():
        old.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _swap(staging: Path, out: Path) -> None:
    old = _sibling(out, "old")
    try:
        if out.exists():
            out.rename(old)
        staging.rename(out)
        _sync_folder(out.parent)
    finally:
        _recover(out)


def _sync(folder: Path) -> None:
    """Bring every file below `folder` to the disk, so that a renamed build is never an empty one after a power cut."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            _sync_folder(path)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
