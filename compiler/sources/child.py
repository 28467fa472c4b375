"""Runs modules in child processes: the memory is freed when a child ends, and a crash becomes one error."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from trimtab.compiler.processes import ending, run_logged
from trimtab.passes.errors import ModelError, TrimtabError
from trimtab.passes.os_errors import reason, remedy

_ERROR_FILE, _NOTE_FILE = "error.json", "note.txt"
_QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}


def content_key(content: str, modules: Sequence[str], packages: Sequence[str]) -> str:
    """The cache key of a child's result: a hash of the input's hash `content`, the code and the package versions.

    Args:
        modules: files of this folder whose code decides the result.
        packages: packages whose versions decide the result.
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
    """Run `python -m module arguments`, which writes the file `out`/`makes`.

    Args:
        out: existing folder that the child writes to; its stdout and stderr are stored there.
        origin: the model that the user gave, for messages.
        what: the child's work, for messages.
        hint: hint of the error if the child ends without a reason.
        timeout_s: seconds after which the child is killed.

    Raises:
        ModelError: the child reported an error, ended without the file, or took too long.
    """
    log_file = out / "export.log"
    try:
        code = run_module(module, arguments, log_file, timeout_s)
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"{origin}: {what} took longer than {timeout_s:g} s", hint=hint) from error
    if code == 0 and (out / makes).is_file():
        return
    if (out / _ERROR_FILE).is_file():
        reported = json.loads((out / _ERROR_FILE).read_text())
        raise ModelError(f"{origin}: {reported['message']}", hint=reported["hint"])
    lines = log_file.read_text(errors="replace").strip().splitlines()[-3:]
    end = ending(code)
    raise ModelError(f"{origin}: {what} {end.words}: {' | '.join(lines) or 'no output'}", hint=end.hint or hint)


def run_module(module: str, arguments: Sequence[str], log_file: Path, timeout_s: float | None) -> int:
    """Run `python -m module arguments` and store its output. Returns its exit code; a negative one is a signal.

    Raises:
        subprocess.TimeoutExpired: it ran longer than `timeout_s`, and was killed.
    """
    return run_logged([sys.executable, "-m", module, *arguments], log_file, env=_QUIET, timeout_s=timeout_s)


def report(out: Path, work: Callable[[], None]) -> int:
    """In the child: call `work`, and store its error in `out`. Returns the exit status."""
    try:
        work()
    except TrimtabError as error:
        message, hint = error.message, error.hint
    except OSError as error:
        if error.errno is None:  # transformers raises OSError for errors of its own
            raise
        message, hint = f"{error.filename or out}: {reason(error)}", remedy(error, error.filename or out)
    except MemoryError:
        message, hint = "not enough memory", "end other programs, or use a machine with more memory"
    else:
        return 0
    (out / _ERROR_FILE).write_text(json.dumps({"message": message, "hint": hint}))
    return 1


def leave_note(out: Path, note: str) -> None:
    """In the child: store a note about the result for the user."""
    (out / _NOTE_FILE).write_text(note)


def read_note(out: Path) -> str | None:
    """Read the note that the child stored in `out`; None without one."""
    path = out / _NOTE_FILE
    return path.read_text() if path.is_file() else None
