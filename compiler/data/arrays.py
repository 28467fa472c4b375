"""Reads the arrays of an .npz file, a ZIP archive of NumPy's .npy files. Only arrays of plain numbers are read.

The archive states the size of each member, and the member's header states the size of its array. Both sizes are
compared with limits and with each other before anything is unpacked.
"""

from __future__ import annotations

import math
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from trimtab.compiler.data.limits import MAX_UNPACKED
from trimtab.passes.errors import DataError

_MAGIC = b"\x93NUMPY"
_MAX_HEADER = 1 << 12
_MAX_MEMBERS = 1 << 10
_CHUNK = 1 << 20
_ENCRYPTED = 1  # bit of ZipInfo.flag_bits
_DESCR = re.compile(r"'descr'\s*:\s*'([<>|=]?(?:b1|[iu][1248]|f[248]))'")
_FORTRAN = re.compile(r"'fortran_order'\s*:\s*(True|False)\b")
_SHAPE = re.compile(r"'shape'\s*:\s*\(([0-9, L]*)\)")
_HINT = "write it with numpy.savez, an array of numbers for each of the model's inputs"
_DAMAGED = "the file is truncated or damaged; write it again"
_FAULTS = (
    ArithmeticError, EOFError, LookupError, OSError, RuntimeError, ValueError, struct.error, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip
"""Exceptions that zipfile raises for damaged archives."""


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays in an .npz file, by name.

    Raises:
        DataError: `path` is not an .npz file, is damaged or exceeds a limit, or a member is no array of numbers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_sizes(path, members)
            arrays: dict[str, np.ndarray] = {}
            for member in members:
                where, name = f"{path}: member {member.filename[:60]!r}", member.filename.removesuffix(".npy")
                if name == member.filename or name in arrays:
                    raise DataError(f"{where} {'comes twice' if name in arrays else 'is no array'}", hint=_HINT)
                _check_packing(where, member)
                with archive.open(member) as file:
                    arrays[name] = _read_array(file, member.file_size, where)
            return arrays
    except _FAULTS as error:
        raise DataError(f"{path}: not an .npz file of plain arrays, or damaged", hint=_HINT) from error


def _check_sizes(path: Path, members: list[zipfile.ZipInfo]) -> None:
    if len(members) > _MAX_MEMBERS:
        raise DataError(f"{path}: has {len(members)} members, over the limit of {_MAX_MEMBERS}", hint=_HINT)
    limit, size = max(MAX_UNPACKED, path.stat().st_size), sum(member.file_size for member in members)
    if size > limit:
        raise DataError(
            f"{path}: unpacks to {size} bytes, over the limit of {limit}", hint="write it with numpy.savez, unpacked"
        )


def _check_packing(where: str, member: zipfile.ZipInfo) -> None:
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & _ENCRYPTED:
        raise DataError(f"{where} is encrypted, or packed by another method than deflate", hint=_HINT)


def _read_array(file: IO[bytes], size: int, where: str) -> np.ndarray:
    """Read the array of an .npy file of `size` bytes (numpy.lib.format, versions 1 to 3)."""
    start = file.read(len(_MAGIC) + 2)
    if start[:-2] != _MAGIC or start[-2] not in (1, 2, 3):
        raise DataError(f"{where} is no array", hint=_HINT)
    width = 2 if start[-2] == 1 else 4
    length = int.from_bytes(file.read(width), "little")
    text = file.read(min(length, _MAX_HEADER)).decode("latin-1")
    descr, fortran, shape = (pattern.search(text) for pattern in (_DESCR, _FORTRAN, _SHAPE))
    if descr is None or fortran is None or shape is None:
        raise DataError(f"{where} is not an array of plain numbers ({text.strip()[:80]})", hint=_HINT)
    dtype = np.dtype(descr[1])
    dims = [int(dim[:20].rstrip("L")) for dim in shape[1].replace(" ", "").split(",") if dim]
    expected, available = math.prod(dims) * dtype.itemsize, size - len(start) - width - length
    if expected != available:
        raise DataError(
            f"{where}: its shape {dims} of {dtype} takes {expected} bytes, and it has {max(available, 0)}",
            hint=_DAMAGED,
        )
    content, offset = np.empty(expected, np.uint8), 0
    while chunk := file.read(_CHUNK):
        content.data[offset : offset + len(chunk)] = chunk
        offset += len(chunk)
    if offset < expected:
        raise DataError(f"{where}: ends after {offset} of {expected} bytes", hint=_DAMAGED)
    return content.view(dtype).reshape(dims, order="F" if fortran[1] == "True" else "C")
