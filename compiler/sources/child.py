"""Modules that run in a process of their own: memory is free again behind them, and a crash is one error."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from trimtab.compiler.processes import end_with_parent, ending
from trimtab.passes.errors import ModelError, TrimtabError
from trimtab.passes.os_errors import reason, remedy

_ERROR_FILE, _NOTE_FILE = "error.json", "note.txt"
_QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}


def content_key(content: str, modules: Sequence[str], packages: Sequence[str]) -> str:
    """The name in the cache of what a child makes of `content`, a hash: it depends on code and versions, too.

    Args:
        modules: files of this folder whose code decides what is made.
    """
    digest = hashlib.sha256(content.encode())
    for name in modules:
        digest.update((Path(__file__).parent / name).read_bytes())
    for package in packages:
        digest.update(f"{package} {importlib.metadata.version(package)}".encode())
    return digest.hexdigest()[:32]


def run_child(
    module: str, arguments: Sequence[str], out: Path, *, makes: str, origin: Path, what: str, hint: str,
    timeout_s: float | None = None,
) -> None:  # fmt: skip
    """Run `python -m module arguments`, which makes the file `out`/`makes`.

    Args:
        out: folder that is there; the child's output is kept in it.
        origin: what the user gave, for messages.
        what: is done, for messages.
        hint: what else the user can do if the child ends without saying why.
        timeout_s: seconds after which the child is killed.

    Raises:
        ModelError: what the child has said, how it ended, or that it took too long.
    """
    log_file = out / "export.log"
    with open(log_file, "wb") as output:
        try:
            code = subprocess.run(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | _QUIET, check=False,
                preexec_fn=end_with_parent(), timeout=timeout_s,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise ModelError(f"{origin}: {what} took longer than {timeout_s:g} s", hint=hint) from error
    if code == 0 and (out / makes).is_file():
        return
    if (out / _ERROR_FILE).is_file():
        said = json.loads((out / _ERROR_FILE).read_text())
        raise ModelError(f"{origin}: {said['message']}", hint=said["hint"])
    lines = log_file.read_text(errors="replace").strip().splitlines()[-3:]
    how = ending(code)
    raise ModelError(f"{origin}: {what} {how.words}: {' | '.join(lines) or 'it said nothing'}", hint=how.hint or hint)


def report(out: Path, work: Callable[[], None]) -> int:
    """In the child: do the work, or leave what is wrong in `out`; returns the exit status."""
    try:
        work()
    except TrimtabError as error:
        message, hint = error.message, error.hint
    except OSError as error:
        if error.errno is None:  # transformers raises some of its own as such
            raise
        message, hint = f"{error.filename or out}: {reason(error)}", remedy(error, error.filename or out)
    except MemoryError:
        message, hint = "not enough memory", "end other programs, or use a machine with more memory"
    else:
        return 0
    (out / _ERROR_FILE).write_text(json.dumps({"message": message, "hint": hint}))
    return 1


def leave_note(out: Path, note: str) -> None:
    """In the child: what the user is to know of what was made."""
    (out / _NOTE_FILE).write_text(note)


def read_note(out: Path) -> str | None:
    """What the child that made `out` has left for the user."""
    path = out / _NOTE_FILE
    return path.read_text() if path.is_file() else None
