"""Stamps, which show whether a file has changed since it was hashed, without reading it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

_YOUNG_NS = 2_000_000_000  # the coarsest clock of a file system in use (FAT)


class Stamp(NamedTuple):
    """The metadata of a file. A program can set mtime, but not ctime, the time of the last change."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


def read_stamp(path: Path, *, follow: bool = True) -> Stamp:
    """The stamp of `path`; with `follow`, of the file that a link leads to.

    Raises:
        OSError: the file does not exist.
    """
    stat = os.stat(path, follow_symlinks=follow)
    return Stamp(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def is_settled(stamp: Stamp) -> bool:
    """Whether every later change of the file gives another stamp. Call this before the file is read.

    A file that changed a moment ago may change again within the same tick of the file system's clock, with the same
    size and times (git calls this racily clean). Two seconds later it cannot. A file with a time in the future is not
    settled.
    """
    return time.time_ns() - max(stamp.mtime_ns, stamp.ctime_ns) > _YOUNG_NS
