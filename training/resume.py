"""What an unfinished training keeps beside its result, so that the same command goes on where it was killed.

The folder `.NAME.training` lies beside the result NAME: it has `state.json`, which says what is done, and the files of
the method. It is bound to a key, a hash of everything that decides the result; a run of another key begins anew.
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
    """The folder of the run that makes `out`.

    Args:
        made_of: everything that decides the result; JSON types.
        first: this process is the first of those that train together: it alone holds the folder, and writes.

    Attributes:
        folder: where the run keeps its files.
        state: what it wrote with `keep`; {} at the beginning.

    Raises:
        BuildError: another process trains to `out`, or the folder cannot be written.
    """

    def __init__(self, out: Path, made_of: Mapping[str, Any], *, first: bool = True) -> None:
        self.folder = out.with_name(f".{out.name}.training")
        self._key, self._first = hash_bytes(json.dumps(made_of, sort_keys=True)), first
        self._lock = FileLock(f"{self.folder}.lock")
        if first:
            self._hold(out)
        self.state = self._read()
        if first and not self.state and self.folder.exists():
            log.warning("%s: begins anew: what is there is of other data, settings or versions", self.folder)
            shutil.rmtree(self.folder)

    def keep(self, **changes: Any) -> None:
        """Change `state` and write it, whole or not at all. JSON types."""
        self.state |= changes
        if not self._first:
            return
        self.folder.mkdir(exist_ok=True)
        part = self.folder / f"{_STATE}.part"
        part.write_text(json.dumps({"key": self._key, "state": self.state}), encoding="utf-8")
        part.replace(self.folder / _STATE)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let other processes go on with the run where what is done here fails."""
        try:
            yield
        except BaseException:
            self.release()
            raise

    def writer(self, write: Callable[[Path], None]) -> Callable[[Path], None]:
        """`write`, behind which the run is finished."""

        def finished(out: Path) -> None:
            with self.held():
                write(out)
            self.finish()

        return finished

    def finish(self) -> None:
        """Remove the folder: the result is written."""
        if self._first:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.release()

    def release(self) -> None:
        """Let other processes go on with the run."""
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
            known = json.loads((self.folder / _STATE).read_text(encoding="utf-8"))
            if known["key"] == self._key:
                return dict(known["state"])
        return {}
