"""Reads the header of a GGUF file within bounds, and checks that its tensors are inside the file.

Counts and lengths in a foreign file cannot be trusted: each is compared with the rest of the file before anything loops
over it. Layout: ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from trimtab.passes.errors import ModelError

_VERSIONS = (2, 3)
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEPTH = 4  # maximum depth of nested arrays
_DIMENSIONS = 4
_ALIGNMENT = 32  # default alignment of tensors, bytes
_AGAIN = "download it again"


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the file.

    Attributes:
        shape: sizes, fastest dimension first, as in GGUF.
        kind: number of the tensor's type.
        offset: offset of the tensor's first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file.

    Attributes:
        values: key → value; for an array, its length.
        tensors: entries of the tensors, in the order of the file.
        size: size of the file, bytes.
    """

    values: dict[str, Any]
    tensors: tuple[TensorEntry, ...]
    size: int


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file.

    Raises:
        ModelError: the file is not a GGUF file, has another version, or is truncated or damaged.
    """
    with open(path, "rb") as file:
        size = path.stat().st_size
        if size < 24 or file.read(4) != b"GGUF":
            raise ModelError("not a GGUF file", hint=_AGAIN)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Cursor(data, size))


class _Cursor:
    def __init__(self, data: mmap.mmap, size: int) -> None:
        self._data, self.size, self.offset = data, size, 4

    def require(self, nbytes: int) -> None:
        """Check that the file has `nbytes` more bytes."""
        if nbytes > self.size - self.offset:
            raise ModelError(
                f"truncated or damaged: its header needs {nbytes} bytes at byte {self.offset}, of {self.size}",
                hint=_AGAIN,
            )

    def number(self, form: str) -> Any:
        self.require(struct.calcsize(f"<{form}"))
        (value,) = struct.unpack_from(f"<{form}", self._data, self.offset)
        self.offset += struct.calcsize(f"<{form}")
        return value

    def string(self) -> str:
        length = self.number("Q")
        self.require(length)
        text = self._data[self.offset : self.offset + length].decode("utf-8", errors="replace")
        self.offset += length
        return text

    def value(self, kind: int, depth: int = 0) -> Any:
        """Read the value of a key; for an array, skip it and return its length."""
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY or depth == _DEPTH:
            raise ModelError(f"damaged: a value of type {kind} at {self.offset}", hint=_AGAIN)
        inner, length = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.require(nbytes := length * struct.calcsize(f"<{_SCALARS[inner]}"))
            self.offset += nbytes
            return length
        self.require(8 * length)  # each string or array begins with its own length
        for _ in range(length):
            self.value(inner, depth + 1)
        return length


def _parse(cursor: _Cursor) -> Header:
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise ModelError(
            f"GGUF of version {version}, or of the other byte order; versions 2 and 3 are read",
            hint="convert the model again with a current llama.cpp",
        )
    count, keys = cursor.number("Q"), cursor.number("Q")
    cursor.require(8 * (count + keys))
    values: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.string()
        values[key] = cursor.value(cursor.number("I"))
    entries = []
    for _ in range(count):
        name, dimensions = cursor.string(), cursor.number("I")
        if not 1 <= dimensions <= _DIMENSIONS:
            raise ModelError(f"damaged: {name!r} has {dimensions} dimensions", hint=_AGAIN)
        shape = tuple(cursor.number("Q") for _ in range(dimensions))
        entries.append((name, shape, cursor.number("I"), cursor.number("Q")))
    alignment = values.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ModelError(f"damaged: an alignment of {alignment}", hint=_AGAIN)
    begin = -(-cursor.offset // alignment) * alignment
    tensors = tuple(TensorEntry(name, shape, kind, begin + offset) for name, shape, kind, offset in entries)
    return Header(values, tensors, cursor.size)


def check_tensors(header: Header, sizes: dict[int, tuple[int, int]]) -> None:
    """Check that all tensors have a known type and are inside the file.

    Args:
        sizes: number of a type → (weights in a block, bytes of a block).

    Raises:
        ModelError: a tensor does not; names the tensor.
    """
    for tensor in header.tensors:
        if tensor.kind not in sizes:
            raise ModelError(
                f"{tensor.name} is of type {tensor.kind}, which this version of the package gguf does not know",
                hint="install a newer gguf, or give the model's Hugging Face checkpoint",
            )
        block, nbytes = sizes[tensor.kind]
        if tensor.shape[0] % block:
            raise ModelError(f"damaged: {tensor.name} has rows of {tensor.shape[0]}, no whole blocks", hint=_AGAIN)
        end = tensor.offset + prod(tensor.shape) // block * nbytes
        if end > header.size:
            raise ModelError(f"truncated: {tensor.name} ends at byte {end}, and the file at {header.size}", hint=_AGAIN)
