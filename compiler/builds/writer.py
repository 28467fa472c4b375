"""Writing a build directory: whole or not at all, by one process at a time, swapped with the old one in one step."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trimtab.compiler.builds.build import Build, absolute, check_outside, sha256_of, sibling
from trimtab.compiler.builds.exchange import exchange
from trimtab.compiler.builds.manifest import FileInfo, Manifest, is_build, write_manifest, write_text
from trimtab.compiler.builds.measured import MEASURED, Measured
from trimtab.compiler.builds.report import render
from trimtab.passes.dials import SpeedPoint
from trimtab.passes.errors import BuildError, TargetError
from trimtab.passes.os_errors import blames, reason, remedy

REPORT = Path("report.md")
_UPDATE_WAIT_S = 30.0  # seconds to wait while another process records measurements


class BuildWriter:
    """Context manager: a folder to write a build into, which replaces `out` on `commit`.

    The folder is hidden, next to `out`, on the same file system. Leaving without a commit, by an error or Ctrl-C,
    removes the folder and does not change `out`. The next writer removes what a killed process left.

    Raises:
        BuildError: `out` is not a build, is being written by another process, or cannot be written.
    """

    def __init__(self, out: Path | str) -> None:
        self.out = absolute(out)
        self.folder = sibling(self.out, "part")
        self._stack = ExitStack()

    def __enter__(self) -> BuildWriter:
        with self._stack, self.writing():
            _check_replaceable(self.out)
            self._stack.enter_context(_parents(self.out))
            _check_writable(self.out)
            self._stack.enter_context(_lock(self.out))
            _recover(self.out)
            _remove(self.folder)
            self._stack.callback(_remove, self.folder)
            self.folder.mkdir()
            self._stack = self._stack.pop_all()  # nothing failed: the contexts stay entered until __exit__
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn file-system errors of the body, which writes the build, into a BuildError.

        For a file that the body only reads, such as the model's, the error names that file.
        """
        try:
            yield
        except OSError as error:
            if blames(error, self.out) or os.fsdecode(error.filename).startswith(str(sibling(self.out, ""))):
                message = f"{self.out}: cannot write the build ({reason(error)})"
                raise BuildError(message, hint=remedy(error, self.out)) from error
            raise BuildError(f"{error.filename}: cannot be read ({reason(error)})", hint=remedy(error)) from error

    @contextmanager
    def naming(self, origin: str) -> Iterator[None]:
        """Let a TargetError of the body name `origin` where it names a file of the hidden folder."""
        try:
            yield
        except TargetError as error:
            message = re.sub(re.escape(str(self.folder)) + r"[^\s:]*", lambda _: origin, error.message)
            raise TargetError(message, hint=error.hint) from error

    def commit(self, manifest: Manifest, measured: Measured | None = None) -> Build:
        """Hash the files, add manifest and report, and swap the folder with `out`.

        Args:
            measured: measurements of this build, under the manifest that it had.
        """
        with self.writing():
            manifest = manifest.model_copy(update={"files": _describe(self.folder)})
            digest = write_manifest(self.folder, manifest)
            if measured is not None:
                measured = measured.model_copy(update={"manifest": digest})
                write_text(self.folder / MEASURED, measured.model_dump_json(indent=2))
            write_text(self.folder / REPORT, render(manifest, measured or Measured(manifest=digest)))
            _sync(self.folder)
            _check_replaceable(self.out)  # again, because much time has passed
            _switch(self.folder, self.out)
        return Build(self.out, manifest, digest)


def store_path(build: Build, path: Sequence[SpeedPoint]) -> Build:
    """Store another path for `speed` in `build`: a new directory replaces the old one in one step.

    Files are hard links to the same bytes, if the file system has them. Measurements stay valid, except costs, which
    are reported by speed.

    Returns:
        The new build, whose manifest has another hash.

    Raises:
        BuildError: the build is gone, was replaced by another, is being replaced, is damaged, or cannot be written.
    """
    with BuildWriter(build.path) as writer:
        with writer.writing(), build.unchanged():
            for name in build.manifest.files:
                (writer.folder / name).parent.mkdir(parents=True, exist_ok=True)
                _link(build.path / name, writer.folder / name)
        measured = build.measured.model_copy(update={"cost": {}})
        if _describe(writer.folder) != build.manifest.files:
            raise BuildError(
                f"{build.path}: damaged: its files are not those that were compiled", hint="compile it again"
            )
        return writer.commit(build.manifest.model_copy(update={"speed": tuple(path)}), measured)


def _link(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`; a copy if the file system has no hard links."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def record(
    build: Build,
    *,
    quality: dict[str, Any] | None = None,
    speed: dict[str, Any] | None = None,
    cost: dict[str, Any] | None = None,
) -> None:
    """Store measurements of `build` in its directory and in its report. A section that is None stays as it was.

    Raises:
        BuildError: the build is gone, was replaced by another, is being replaced, or cannot be written.
    """
    writer = BuildWriter(build.path)
    with writer.writing(), _lock(writer.out, timeout=_UPDATE_WAIT_S), build.unchanged():
        sections = {"quality": quality, "speed": speed, "cost": cost}
        changes = {key: value for key, value in sections.items() if value is not None}
        measured = build.measured.model_copy(update=changes)
        write_text(build.path / MEASURED, measured.model_dump_json(indent=2))
        write_text(build.path / REPORT, render(build.manifest, measured))


def _check_replaceable(out: Path) -> None:
    """Refuse to write a build over anything but a build or an empty directory, and into another build."""
    hint = "choose another directory, or remove this one yourself"
    if out.exists() and not out.is_dir():
        raise BuildError(f"{out}: exists and is not a directory", hint=hint)
    if out.is_dir() and any(out.iterdir()) and not is_build(out):
        raise BuildError(f"{out}: exists and is not a build, so it is left alone", hint=hint)
    check_outside(out)


def _check_writable(out: Path) -> None:
    """Check that folders can be created next to `out`; if not, filelock may report a lock that another process holds.

    The folder always has the same name, so that the next writer removes what a killed one left.
    """
    probe = sibling(out, "probe")
    probe.mkdir(exist_ok=True)
    with suppress(FileNotFoundError):  # another writer made the same check at the same time
        probe.rmdir()


def _describe(folder: Path) -> dict[str, FileInfo]:
    """Hash and size of every file below `folder`."""
    return {
        path.relative_to(folder).as_posix(): FileInfo(sha256=sha256_of(path), bytes=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextmanager
def _lock(out: Path, *, timeout: float = 0) -> Iterator[None]:
    """Hold the lock for writing `out`.

    The lock file is removed while the lock is held. filelock checks that a lock file still has its name, so a process
    that opened it before the removal does not count it as a lock.
    """
    path = sibling(out, "lock")
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
    """Create the folders above `out`, and remove them again if no build was written."""
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
    """Undo a swap whose process was killed between the two renames of `_switch`."""
    old = sibling(out, "old")
    if old.exists() and not out.exists():
        old.rename(out)
    _remove(old)


def _switch(staging: Path, out: Path) -> None:
    """Rename `staging` to `out` and remove the old `out`. If the system can swap, `out` exists at all times."""
    if out.exists() and exchange(staging, out):
        _sync_folder(out.parent)
        _remove(staging)  # the old build by now
        return
    old = sibling(out, "old")
    try:
        if out.exists():
            out.rename(old)
        staging.rename(out)
        _sync_folder(out.parent)
    finally:
        _recover(out)


def _remove(folder: Path) -> None:
    """Remove `folder` if it exists, including read-only folders in it."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.is_dir():
        for place, _, _ in os.walk(folder):  # top-down, so that subfolders become accessible
            with suppress(OSError):
                os.chmod(place, stat.S_IRWXU)
        shutil.rmtree(folder, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Flush every file below `folder` to the disk, so that a renamed build is complete after a power cut."""
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
