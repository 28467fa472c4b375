"""Finds NaN and infinity in weights. Weights are read in chunks, so that no weight is ever in memory whole.

A constant that is no weight may be infinite: a mask's fill value, or a limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from trimtab.passes.errors import ModelError
from trimtab.passes.graph import values
from trimtab.passes.graph.weights import ExternalValues, data_type

_CHUNK = 1 << 22  # values of one chunk


def check_finite(constants: Iterable[gs.Constant], *, hint: str) -> None:
    """Refuse constants with NaN, and weights with infinity.

    A scalar may be infinite, and a mask, a tensor of any shape that holds 0 and -inf alone, may hold -inf.

    Raises:
        ModelError: names the first such weight, how many of its values are not finite, and the index of the first.
    """
    for constant in constants:
        position, bad, damaged = 0, 0, False
        for chunk in _floats(constant):
            wrong = ~np.isfinite(chunk)
            if wrong.any():
                if not bad:
                    first = position + int(wrong.argmax())
                bad += int(wrong.sum())
                damaged = damaged or bool(np.isnan(chunk).any())
            position += chunk.size
        if bad and (damaged or not _may_be_infinite(constant)):
            index = [int(i) for i in np.unravel_index(first, constant.shape)]
            raise ModelError(
                f"weight {constant.name!r}: {bad} of its values are NaN or infinite, first at {index}", hint=hint
            )


def _may_be_infinite(constant: gs.Constant) -> bool:
    """Whether `constant`, which holds no NaN, is a scalar, or a mask of 0 and -inf."""
    return not constant.shape or all(bool(((chunk == 0) | (chunk == -np.inf)).all()) for chunk in _floats(constant))


def _floats(constant: gs.Constant) -> Iterator[np.ndarray]:
    """The values of a floating-point constant, flat, a chunk at a time; nothing for other types."""
    stored = constant._values
    if isinstance(stored, ExternalValues):
        yield from _from_file(stored)
        return
    if not _is_float(data_type(constant)):
        return
    flat = values(constant).reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        yield flat[start : start + _CHUNK]


def _from_file(stored: ExternalValues) -> Iterator[np.ndarray]:
    if not _is_float(stored.tensor.data_type):
        return
    dtype = onnx.helper.tensor_dtype_to_np_dtype(stored.tensor.data_type)
    count = stored.bytes // dtype.itemsize
    with open(stored.path, "rb") as file:  # read, not mapped: mapped pages would count as memory until the end
        file.seek(stored.offset)
        for start in range(0, count, _CHUNK):
            yield np.frombuffer(file.read(min(_CHUNK, count - start) * dtype.itemsize), dtype)


def _is_float(data_type: int) -> bool:
    return data_type in (
        onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE,
    )  # fmt: skip
