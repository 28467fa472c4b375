"""Child processes: how one has ended, in words, and that none outlives the process that started it."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_TAIL = 12  # lines of a log that go into an error
_PR_SET_PDEATHSIG = 1
_CRASHES = {
    "SIGABRT": "a library in it gave up: the log says which, if anything does; update it",
    "SIGBUS": "a disk or /dev/shm may be full, or a file was cut while it was mapped: make room, and start again",
    "SIGFPE": "a library in it divided by zero; update it",
    "SIGILL": "a library in it uses instructions that this processor lacks: install a build of it for this processor",
    "SIGSEGV": "a library in it accessed memory that is not its own; update it",
    "SIGSYS": "a sandbox forbids a system call that it makes: allow it, or run outside of the sandbox",
    "SIGTRAP": "a library in it gave up: the log says which, if anything does; update it",
}
"""Signals by which the system ends a process for its own fault, and what to do."""

_OUTSIDE = {
    "SIGKILL": "most often memory ran out: end other programs, take smaller sizes, or a machine with more memory",
    "SIGXCPU": "it used up its limit of CPU time: raise it (ulimit -t)",
    "SIGXFSZ": "a file reached the limit of sizes: raise it (ulimit -f)",
}
"""Signals that come from outside, and what to do."""

_ENDED = "something outside of trimtab ended it: start again"


class Ending(NamedTuple):
    """How a process has ended.

    Attributes:
        words: what happened, to go behind the name of the process: "crashed (SIGSEGV)".
        hint: what to do about it; None where its own words have to say.
    """

    words: str
    hint: str | None


def ending(code: int) -> Ending:
    """How the process with the return code `code` has ended, as `subprocess` has it: below 0 for a signal."""
    if code >= 0:
        return Ending(f"failed (exit code {code})", None)
    name = signal_name(-code)
    if name in _CRASHES:
        return Ending(f"crashed ({name})", _CRASHES[name])
    return Ending(f"was ended by {name}", _OUTSIDE.get(name, _ENDED))


def signal_name(number: int) -> str:
    """Such as SIGKILL."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def tail(log: Path) -> str:
    """The end of a log, to go behind a message; nothing of an empty one."""
    lines = log.read_text(errors="replace").strip().splitlines()[-_TAIL:]
    return "\n  ".join(["; its last words:", *lines]) if lines else ""


def end_with_parent() -> Callable[[], None] | None:
    """A `preexec_fn` for `subprocess`: the system ends the child when this process is killed (Linux; else None).

    The signal comes when the *thread* that starts the child ends: it has to wait for the child.
    """
    parent, prctl = os.getpid(), _PRCTL
    if prctl is None:
        return None

    def ask_system() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it was killed before the system knew
            os._exit(1)

    return ask_system


def _find_prctl() -> Any:
    """The C library's function, or None where it has none."""
    try:
        return ctypes.CDLL(None).prctl
    except (OSError, AttributeError, TypeError):
        return None


_PRCTL = _find_prctl()
"""Looked up when this module is imported: between fork and exec, a lock that another thread holds stays locked."""
