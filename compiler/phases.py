"""What a compile costs: time for each phase, and the most memory that the process held."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total) as work advances."""

_WORTH = 8 << 20
"""Bytes that a process has to grow by before it is looked through."""


class Phases:
    """Times phases and announces them.

    Attributes:
        seconds: phase → how long it took.
        progress: for work that can tell how far it is.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self.progress: Progress = progress or (lambda what, done, total: None)
        self.seconds: dict[str, float] = {}
        self._resident = resident_bytes()

    @contextmanager
    def __call__(self, name: str, *, shown: bool = True) -> Iterator[None]:
        """Time the body, and give the memory it freed back. Not `shown`: the body shows its own progress."""
        start = time.perf_counter()
        if shown:
            self.progress(name, 0, 1)
        yield
        self.give_back()
        self.seconds[name] = round(time.perf_counter() - start, 3)
        if shown:
            self.progress(name, 1, 1)

    def give_back(self) -> None:
        """Return what was freed since this was last done."""
        self._resident = give_back(self._resident)


def give_back(since: int | None) -> int | None:
    """Return freed memory to the system. Graphs are cycles, and glibc keeps what a phase needed for itself alone.

    Where the process has hardly grown there is little to return, and it costs: a collection looks at every object of
    the process, which beside torch and what the caller holds may take a second.

    Args:
        since: `resident_bytes` before.

    Returns:
        what to compare with the next time.
    """
    resident = resident_bytes()
    if resident is not None and since is not None and resident - since < _WORTH:
        return min(since, resident)
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):  # another C library or system
        ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes()


def resident_bytes() -> int | None:
    """The resident memory of this process; None where the system does not tell."""
    return _status_bytes("VmRSS")


def peak_memory_bytes() -> int | None:
    """The most resident memory that this process ever held; None where the system does not tell.

    Linux alone: getrusage would count the parent's memory too, which a child has until it starts its own program.
    """
    return _status_bytes("VmHWM")


def _status_bytes(label: str) -> int | None:
    """A number of Linux's on this process; None on another system."""
    status = Path("/proc/self/status")
    found = re.search(rf"{label}:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) * 1024 if found else None
