"""The memory of this process: its resident set size (RSS), the peak of it, and returning freed memory."""

from __future__ import annotations

import ctypes
import gc
import re
from contextlib import suppress
from pathlib import Path

_MIN_GROWTH = 8 << 20
"""Minimum growth of RSS, in bytes, before `gc.collect()` runs."""


def give_back(since: int | None) -> int | None:
    """Return freed memory to the system. Graphs are reference cycles, and glibc keeps the memory that a phase freed.

    If RSS has hardly grown, nothing is done: a garbage collection visits every object of the process, which with torch
    and the caller's objects may take a second.

    Args:
        since: `resident_bytes` before the phase.

    Returns:
        The RSS to pass as `since` the next time.
    """
    resident = resident_bytes()
    if resident is not None and since is not None and resident - since < _MIN_GROWTH:
        return min(since, resident)
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):  # another C library or system
        ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes()


def resident_bytes() -> int | None:
    """RSS of this process; None where the system does not report it."""
    return _status_bytes("VmRSS")


def peak_memory_bytes() -> int | None:
    """Peak RSS of this process; None where the system does not report it.

    Only Linux reports it. getrusage would include the parent's memory, which a child has until it starts its program.
    """
    return _status_bytes("VmHWM")


def _status_bytes(label: str) -> int | None:
    """The value of `label` in /proc/self/status, in bytes; None on another system than Linux."""
    status = Path("/proc/self/status")
    match = re.search(rf"{label}:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return int(match[1]) * 1024 if match else None
