"""The memory of this process: how much it holds, the most it held, and how to return what was freed."""

from __future__ import annotations

import ctypes
import gc
import re
from contextlib import suppress
from pathlib import Path

_MIN_GROWTH = 8 << 20
"""Minimum growth of the resident memory, in bytes, before `gc.collect()` runs."""


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
    if resident is not None and since is not None and resident - since < _MIN_GROWTH:
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
