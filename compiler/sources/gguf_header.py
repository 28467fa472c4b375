"""The header of a GGUF file, read with bounds: what it says of itself, and that its tensors lie within it.

Counts and lengths of a file of someone else are not to be trusted: each is compared with what is left of the file
before anything loops over it. Layout: ggml's docs/gguf.md, versions 2 and 3.
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
_DEPTH = 4  # arrays in arrays
_DIMENSIONS = 4
_ALIGNMENT = 32  # of tensors, where the file says nothing
_AGAIN = "download it again"


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the file.

    Attributes:
        shape: the fastest dimension first, as GGUF has it.
        kind: number of its type.
        at: place in the file of its first byte.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    at: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself.

    Attributes:
        values: by key; of arrays, their lengths alone.
        tensors: in the order of the file.
        size: of the file, bytes.
    """

    values: dict[str, Any]
    tensors: tuple[TensorEntry, ...]
    size: int


def read_header(path: Path) -> Header:
    """The header of a GGUF file.

    Raises:
        ModelError: not a GGUF file, of another version, truncated or damaged.
    """
    with open(path, "rb") as file:
        size = path.stat().st_size
        if size < 24 or file.read(4) != b"GGUF":
            raise ModelError("not a GGUF file", hint=_AGAIN)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Cursor(data, size))


class _Cursor:
    def __init__(self, data: mmap.mmap, size: int) -> None:
        self._data, self.size, self.at = data, size, 4

    def left(self, wanted: int) -> None:
        """Refuse a header that goes on for `wanted` bytes where the file does not."""
        if wanted > self.size - self.at:
            raise ModelError(
                f"truncated or damaged: at byte {self.at} its header wants {wanted} more, of {self.size}",
                hint=_AGAIN,
            )

    def number(self, form: str) -> Any:
        self.left(struct.calcsize(f"<{form}"))
        (value,) = struct.unpack_from(f"<{form}", self._data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return value

    def string(self) -> str:
        length = self.number("Q")
        self.left(length)
        found = self._data[self.at : self.at + length].decode("utf-8", errors="replace")
        self.at += length
        return found

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value of a key; of an array, its length."""
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY or depth == _DEPTH:
            raise ModelError(f"damaged: a value of type {kind} at {self.at}", hint=_AGAIN)
        inner, length = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.left(whole := length * struct.calcsize(f"<{_SCALARS[inner]}"))
            self.at += whole
            return length
        self.left(8 * length)  # strings and arrays begin with a length of their own
        for _ in range(length):
            self.value(inner, depth + 1)
        return length


def _parse(cursor: _Cursor) -> Header:
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise ModelError(
            f"GGUF of version {version}, or of the other byte order; versions 2 and 3 are read",
            hint="convert the model again with llama.cpp of today",
        )
    count, keys = cursor.number("Q"), cursor.number("Q")
    cursor.left(8 * (count + keys))
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
    begin = -(-cursor.at // alignment) * alignment
    tensors = tuple(TensorEntry(name, shape, kind, begin + at) for name, shape, kind, at in entries)
    return Header(values, tensors, cursor.size)


def check_tensors(header: Header, sizes: dict[int, tuple[int, int]]) -> None:
    """Check that all tensors are of a known type and lie within the file.

    Args:
        sizes: number of a type → weights of a block, and its bytes.

    Raises:
        ModelError: says which does not.
    """
    for tensor in header.tensors:
        if tensor.kind not in sizes:
            raise ModelError(
                f"{tensor.name} is of type {tensor.kind}, which this version of the package gguf does not know",
                hint="a newer gguf may; else give the model's Hugging Face checkpoint",
            )
        block, nbytes = sizes[tensor.kind]
        if tensor.shape[0] % block:
            raise ModelError(f"damaged: {tensor.name} has rows of {tensor.shape[0]}, no whole blocks", hint=_AGAIN)
        end = tensor.at + prod(tensor.shape) // block * nbytes
        if end > header.size:
            raise ModelError(f"truncated: {tensor.name} ends at byte {end}, and the file at {header.size}", hint=_AGAIN)
