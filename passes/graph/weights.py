"""Weights on disk: initializers are memory-mapped when read, and copied as bytes when saved."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from trimtab.passes.errors import ModelError, quoted
from trimtab.passes.hashing import hash_bytes, hash_data, hash_file
from trimtab.passes.os_errors import reason, remedy

_CHUNK = 1 << 24  # bytes copied at a time
_ALIGN = 4096  # alignment of tensors in a data file, so that a runtime may map them
_PACKED_BITS: dict[int, int] = {
    TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.FLOAT4E2M1: 4, TensorProto.INT2: 2, TensorProto.UINT2: 2,
    TensorProto.FLOAT6E2M3: 6, TensorProto.FLOAT6E3M2: 6,
}  # fmt: skip


def byte_size(tensor: TensorProto) -> int:
    """Bytes of the values of `tensor` when stored raw; 0 for strings, which are never stored raw."""
    count = math.prod(tensor.dims)
    if tensor.data_type == TensorProto.STRING:
        return 0
    if tensor.data_type in _PACKED_BITS:
        return -(-count * _PACKED_BITS[tensor.data_type] // 8)
    return count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


class ExternalValues(LazyValues):
    """Values in an external data file, memory-mapped on `load` and not kept in memory.

    gs.Constant keeps such an object until `.values` is read, and the exporter passes its TensorProto through, so an
    untouched weight costs no memory however large it is.

    Args:
        tensor: a TensorProto with data_location EXTERNAL.
        base: the folder of the model file; the data must be inside it.
    """

    def __init__(self, tensor: TensorProto, base: Path) -> None:
        entries = {e.key: e.value for e in tensor.external_data}
        self.path = contained(base, entries.get("location", ""), tensor.name)
        self.named = base / entries["location"]
        try:
            super().__init__(tensor)
            self.bytes = byte_size(tensor)
            self.offset, length = int(entries.get("offset", 0)), int(entries.get("length", self.bytes))
        except (KeyError, ValueError) as error:
            raise ModelError(
                f"weight {tensor.name!r}: its type, or its offset or length in {self.path.name}, is not valid",
                hint="export the model again",
            ) from error
        if not os.path.isfile(self.path):  # pathlib's is_file raises for names that the system does not allow
            raise ModelError(
                f"weight {quoted(tensor.name)}: its external data file {quoted(self.path.name)} is missing from {base}",
                hint="copy the data file beside the model, or export the model again",
            )
        available = self.path.stat().st_size - self.offset
        if self.offset < 0 or self.bytes < 0 or length != self.bytes or available < self.bytes:
            raise ModelError(
                f"weight {tensor.name!r}: {self.path.name} holds {max(available, 0)} bytes from offset {self.offset}, "
                f"but its shape {list(tensor.dims)} needs {self.bytes}",
                hint="the data file is truncated or belongs to another model; export the model again",
            )

    def load(self) -> np.ndarray:
        if self.tensor.data_type in _PACKED_BITS:
            return numpy_helper.to_array(self.inline())
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self.tensor.data_type)
        return self.raw().view(dtype).reshape(tuple(self.tensor.dims))

    def raw(self) -> np.ndarray:
        """The bytes of the file, memory-mapped: [bytes], uint8."""
        return np.memmap(self.path, np.uint8, "r", self.offset, (self.bytes,)) if self.bytes else np.zeros(0, np.uint8)

    def hash(self) -> str:
        """blake3 of the raw bytes, without mapping them: mapped bytes would count as RSS."""
        try:
            return hash_file(self.path, self.offset, self.bytes)
        except OSError as error:
            raise ModelError(
                f"weight {self.tensor.name!r}: {self.path} cannot be read ({reason(error)})", hint=remedy(error)
            ) from error

    def inline(self) -> TensorProto:
        """The same tensor with its values in the TensorProto."""
        tensor = self.tensor
        return TensorProto(
            name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=self.raw().tobytes()
        )

    def copy_to(self, file: BinaryIO) -> None:
        """Append the raw bytes to `file`, a chunk at a time."""
        with open(self.path, "rb") as source:
            source.seek(self.offset)
            left = self.bytes
            while left:
                chunk = source.read(min(left, _CHUNK))
                if not chunk:
                    raise ModelError(
                        f"weight {self.tensor.name!r}: {self.path} ended early while it was copied",
                        hint="see that nothing writes to the file meanwhile",
                    )
                file.write(chunk)
                left -= len(chunk)


class Derived(LazyValues):
    """Values computed from other constants on each `load`, and not kept in memory.

    Args:
        like: other values of the same type.
        shape: the shape of the computed values.
    """

    def __init__(self, like: LazyValues | np.ndarray, shape: Sequence[int]) -> None:
        self.data_type, self.dtype, self.shape = _data_type(like), like.dtype, [int(n) for n in shape]
        self.nbytes = byte_size(TensorProto(data_type=self.data_type, dims=self.shape))

    @property
    def tensor(self) -> TensorProto:
        """A new TensorProto with the values inside, for code that does not know `Derived`."""
        return numpy_helper.from_array(np.ascontiguousarray(self.load()))


class Part(Derived):
    """Some rows or columns of a constant's values.

    Args:
        whole: all values, as `gs.Constant` stores them.
        index: the rows or columns along `axis`.
    """

    def __init__(self, whole: LazyValues | np.ndarray, axis: int, index: slice) -> None:
        self.whole, self.axis, self.index = whole, axis, index
        super().__init__(whole, [len(range(n)[index]) if i == axis else n for i, n in enumerate(whole.shape)])

    def load(self) -> np.ndarray:
        part: np.ndarray = _load(self.whole)[(slice(None),) * self.axis + (self.index,)]
        return part


class Joined(Derived):
    """The values of several constants of one type, side by side along `axis`."""

    def __init__(self, parts: Sequence[LazyValues | np.ndarray], axis: int) -> None:
        self.parts, self.axis = parts, axis
        shape = [*parts[0].shape]
        shape[axis] = sum(part.shape[axis] for part in parts)
        super().__init__(parts[0], shape)

    def load(self) -> np.ndarray:
        return np.concatenate([_load(part) for part in self.parts], self.axis)


def _load(stored: LazyValues | np.ndarray) -> np.ndarray:
    if isinstance(stored, ExternalValues | Derived):
        return stored.load()
    # graphsurgeon's own `load` warns about types that numpy lacks
    return numpy_helper.to_array(stored.tensor) if isinstance(stored, LazyValues) else stored


def append(constant: gs.Constant, file: BinaryIO, location: str) -> LazyValues:
    """Write the values of `constant` at the end of `file`; returns the reference to them, at `location`."""
    file.write(b"\0" * (-file.tell() % _ALIGN))
    start, stored = file.tell(), constant._values
    if isinstance(stored, ExternalValues):
        stored.copy_to(file)
    elif isinstance(stored, Derived):
        file.write(_stored(stored.load()))
    elif isinstance(stored, LazyValues):
        file.write(_raw(stored.tensor))
    else:
        file.write(_stored(stored))
    file.flush()
    reference = TensorProto(name=constant.name, dims=constant.shape, data_location=TensorProto.EXTERNAL)
    reference.data_type = data_type(constant)
    for key, value in (("location", location), ("offset", start), ("length", file.tell() - start)):
        reference.external_data.add(key=key, value=str(value))
    return LazyValues(reference)


def _raw(tensor: TensorProto) -> bytes:
    if tensor.HasField("raw_data"):
        return tensor.raw_data
    return numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data


def is_packed(array: np.ndarray) -> bool:
    """Whether several values of `array` share a byte in a file: ml_dtypes' types of fewer than eight bits."""
    return onnx.helper.np_dtype_to_tensor_dtype(array.dtype) in _PACKED_BITS


def _stored(array: np.ndarray) -> memoryview:
    """The values of `array` as the bytes of a file."""
    if is_packed(array):
        return memoryview(numpy_helper.from_array(array).raw_data)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def contained(base: Path, location: str, name: str) -> Path:
    """The file `location` below `base`; absolute paths, `..` and links to files outside are refused.

    In the cache of Hugging Face's hub each file of a snapshot is a link to one of the repository's blobs. Links to
    these blobs are allowed.
    """
    base = base.resolve()
    try:
        path = (base / location).resolve()
    except (OSError, RuntimeError, ValueError):  # an invalid name; links in a cycle
        path = base.parent
    blobs = _blobs(base)
    inside = path.is_relative_to(base) or (blobs is not None and path.parent == blobs)
    if not location or os.path.isabs(location) or ".." in Path(location).parts or not inside:
        raise ModelError(
            f"weight {name!r}: its external data {location!r} is outside the model's folder {base}",
            hint="store the external data in the model's folder or below it",
        )
    return path


def _blobs(folder: Path) -> Path | None:
    """The blobs of the repository, if `folder` is in a snapshot of a hub's cache: REPOSITORY/snapshots/REVISION/..."""
    for snapshot in (folder, *folder.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repository.name.startswith("models--"):
            return repository / "blobs"
    return None


def is_external(constant: gs.Constant) -> bool:
    """True while the values of `constant` are in an external file and have not been read."""
    return isinstance(constant._values, ExternalValues)


def values(constant: gs.Constant) -> np.ndarray:
    """The values of `constant` without keeping them in the graph, unlike `constant.values`. Read-only."""
    stored = constant._values
    return stored.load() if isinstance(stored, LazyValues) else stored


def data_type(constant: gs.Constant) -> int:
    """The ONNX type of the values of `constant`, without reading them."""
    return _data_type(constant._values)


def _data_type(stored: LazyValues | np.ndarray) -> int:
    if isinstance(stored, Derived):
        return stored.data_type
    return int(
        stored.tensor.data_type
        if isinstance(stored, LazyValues)
        else onnx.helper.np_dtype_to_tensor_dtype(stored.dtype)
    )


def stored_bytes(constant: gs.Constant) -> int:
    """Bytes of the values of `constant` in a file, without reading them."""
    stored = constant._values
    if isinstance(stored, Derived):
        return int(stored.nbytes)
    if isinstance(stored, LazyValues):
        return byte_size(stored.tensor)
    return len(_stored(stored)) if is_packed(stored) else int(stored.nbytes)


def fingerprint(constant: gs.Constant) -> str:
    """A hash of type, shape and every byte of the values, however they are stored; read in pieces from external data.

    Raises:
        ModelError: the external data cannot be read.
    """
    stored = constant._values
    if isinstance(stored, ExternalValues):
        dtype, digest = stored.tensor.data_type, stored.hash()
    elif isinstance(stored, LazyValues) and isinstance(stored.tensor, TensorProto):
        dtype, digest = stored.tensor.data_type, _hash(stored.tensor)
    else:
        array = values(constant)
        dtype = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        strings = dtype == TensorProto.STRING
        digest = _hash(numpy_helper.from_array(array)) if strings else hash_data(_stored(array))
    return hash_bytes(f"{dtype}{list(constant.shape)}", digest)


def _hash(tensor: TensorProto) -> str:
    if tensor.data_type == TensorProto.STRING:
        return hash_bytes(*tensor.string_data)
    return hash_data(_raw(tensor))
