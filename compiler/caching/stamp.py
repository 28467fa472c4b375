"""Whether a file is the one that was hashed before, without reading it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

_YOUNG_NS = 2_000_000_000  # the coarsest clock of a file system in use (FAT)


class Stamp(NamedTuple):
    """What a file system says of a file. A program can set mtime, but not ctime, the time of the last change."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


def read_stamp(path: Path, *, follow: bool = True) -> Stamp:
    """The stamp of `path`, or of the file that it links to if `follow`.

    Raises:
        OSError: there is no such file.
    """
    stat = os.stat(path, follow_symlinks=follow)
    return Stamp(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def is_settled(stamp: Stamp) -> bool:
    """Whether every later change of the file gives another stamp. Call it before the file is read.

    A file that changed a moment ago may change once more within the same tick of the file system's clock, with size
    and times unchanged (git calls this racily clean). Two seconds later it cannot. A time in the future proves nothing.
    """
    return time.time_ns() - max(stamp.mtime_ns, stamp.ctime_ns) > _YOUNG_NS
