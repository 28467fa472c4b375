"""The folder of an unfinished training, from which the same command resumes after it was killed.

The folder `.NAME.training` is stored next to the result NAME. It has `state.json`, the state of the run, and files of
the method. A key, the hash of everything that decides the result, protects it: a run with another key starts again.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trimtab.passes.errors import BuildError
from trimtab.passes.hashing import hash_bytes

log = logging.getLogger(__name__)

_STATE = "state.json"


class Unfinished:
    """The folder of the run that trains `out`.

    Args:
        origin: everything that decides the result; JSON types.
        first: this process is the first of those that train together. Only it locks and writes the folder.

    Attributes:
        folder: folder of the run's files.
        state: the state written by `keep`; {} at the beginning.

    Raises:
        BuildError: another process trains to `out`, or the folder cannot be written.
    """

    def __init__(self, out: Path, origin: Mapping[str, Any], *, first: bool = True) -> None:
        self.folder = out.with_name(f".{out.name}.training")
        self._key, self._first = hash_bytes(json.dumps(origin, sort_keys=True)), first
        self._lock = FileLock(f"{self.folder}.lock")
        if first:
            self._hold(out)
        self.state = self._read()
        if first and not self.state and self.folder.exists():
            log.warning("%s: begins anew: what is there is of other data, settings or versions", self.folder)
            shutil.rmtree(self.folder)

    def keep(self, **changes: Any) -> None:
        """Change `state` and write it atomically. JSON types."""
        self.state |= changes
        if not self._first:
            return
        self.folder.mkdir(exist_ok=True)
        part = self.folder / f"{_STATE}.part"
        part.write_text(json.dumps({"key": self._key, "state": self.state}), encoding="utf-8")
        part.replace(self.folder / _STATE)

    @contextmanager
    def released_on_error(self) -> Iterator[None]:
        """Release the lock if the body fails, so that other processes can resume the run."""
        try:
            yield
        except BaseException:
            self.release()
            raise

    def writer(self, write: Callable[[Path], None]) -> Callable[[Path], None]:
        """A function that calls `write` and then finishes the run."""

        def finished(out: Path) -> None:
            with self.released_on_error():
                write(out)
            self.finish()

        return finished

    def finish(self) -> None:
        """Remove the folder: the result is written."""
        if self._first:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.release()

    def release(self) -> None:
        """Release the lock, so that other processes can resume the run."""
        if self._lock.is_locked:
            with suppress(OSError):
                Path(self._lock.lock_file).unlink()
            self._lock.release()

    def _hold(self, out: Path) -> None:
        try:
            out.absolute().parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            hint = "wait for it, or give another -o"
            raise BuildError(f"{out}: another process is training to it", hint=hint) from error
        except OSError as error:
            raise BuildError(f"{out}: cannot be written ({error.strerror or error})", hint="give another -o") from error

    def _read(self) -> dict[str, Any]:
        with suppress(OSError, ValueError, KeyError, TypeError):
            stored = json.loads((self.folder / _STATE).read_text(encoding="utf-8"))
            if stored["key"] == self._key:
                return dict(stored["state"])
        return {}
