"""Child processes: running one, describing how it ended, and ending each with the process that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_TAIL = 12  # lines of a log that an error shows
_PR_SET_PDEATHSIG = 1
_CRASHES = {
    "SIGABRT": "a library in it aborted: its log may name the library; update it",
    "SIGBUS": "a disk or /dev/shm may be full, or a file was truncated while it was mapped: free space, start again",
    "SIGFPE": "a library in it divided by zero; update it",
    "SIGILL": "a library in it uses instructions that this processor lacks: install a build of it for this processor",
    "SIGSEGV": "a library in it accessed memory that is not its own; update it",
    "SIGSYS": "a sandbox forbids a system call that it makes: allow it, or run outside of the sandbox",
    "SIGTRAP": "a library in it aborted: its log may name the library; update it",
}
"""Signals with which the system ends a process because of the process's own error, and what to do."""

_OUTSIDE = {
    "SIGKILL": "most often memory ran out: end other programs, use smaller sizes, or a machine with more memory",
    "SIGXCPU": "it used up its limit of CPU time: raise it (ulimit -t)",
    "SIGXFSZ": "a file reached the limit of sizes: raise it (ulimit -f)",
}
"""Signals that come from outside, and what to do."""

_ENDED = "something outside of trimtab ended it: start again"


class Ending(NamedTuple):
    """How a process ended.

    Attributes:
        words: what happened, to follow the name of the process: "crashed (SIGSEGV)".
        hint: what to do; None where only the process's own output can say.
    """

    words: str
    hint: str | None


def ending(code: int) -> Ending:
    """How the process with the return code `code` of `subprocess` ended; a negative code is a signal."""
    if code >= 0:
        return Ending(f"failed (exit code {code})", None)
    name = signal_name(-code)
    if name in _CRASHES:
        return Ending(f"crashed ({name})", _CRASHES[name])
    return Ending(f"was ended by {name}", _OUTSIDE.get(name, _ENDED))


def signal_name(number: int) -> str:
    """The name of a signal, such as SIGKILL."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def run_logged(command: Sequence[str], log: Path, *, env: Mapping[str, str], timeout_s: float | None) -> int:
    """Run `command`, which ends with this process, and store its output in `log`.

    Args:
        env: environment variables, in addition to ours.

    Returns:
        The exit code; a negative one is a signal.

    Raises:
        subprocess.TimeoutExpired: it ran longer than `timeout_s`, and was killed.
    """
    with log.open("wb") as output:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=os.environ | env,
            preexec_fn=end_with_parent(), timeout=timeout_s, check=False,
        ).returncode  # fmt: skip


def tail(log: Path) -> str:
    """The last lines of a log, to follow a message; "" for an empty log."""
    lines = log.read_text(errors="replace").strip().splitlines()[-_TAIL:]
    return "\n  ".join(["; its last output:", *lines]) if lines else ""


def end_with_parent() -> Callable[[], None] | None:
    """A `preexec_fn` for `subprocess`: the system ends the child when this process is killed (Linux; else None).

    The system sends the signal when the *thread* that started the child ends, so that thread must wait for the child.
    """
    parent, prctl = os.getpid(), _PRCTL
    if prctl is None:
        return None

    def ask_system() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # the parent was killed before prctl took effect
            os._exit(1)

    return ask_system


def _find_prctl() -> Any:
    """The C library's function `prctl`, or None where the library has none."""
    try:
        return ctypes.CDLL(None).prctl
    except (OSError, AttributeError, TypeError):
        return None


_PRCTL = _find_prctl()
"""Looked up at import: between fork and exec, a lock that another thread held stays locked, and a look-up may block."""
