"""ONNX element types in torch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor

TORCH_TYPE: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    # Half precision is how weights are kept, not how one learns: everything is computed in float32 or under autocast.
    TensorProto.FLOAT16: torch.float32,
    TensorProto.BFLOAT16: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.UINT16: torch.int32,
    TensorProto.UINT32: torch.int64,
    TensorProto.BOOL: torch.bool,
    # Types of a few bits lie in bytes, one value each.
    TensorProto.INT4: torch.int8,
    TensorProto.UINT4: torch.uint8,
    TensorProto.INT2: torch.int8,
    TensorProto.UINT2: torch.uint8,
}


def torch_type(onnx_type: int | type | np.dtype) -> torch.dtype:
    """The torch type to compute in for an ONNX element type (its number) or a numpy type."""
    number = onnx_type if isinstance(onnx_type, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(onnx_type))
    if number not in TORCH_TYPE:
        raise TypeError(f"no torch type for ONNX type {onnx.helper.tensor_dtype_to_string(number)}")
    return TORCH_TYPE[number]


def to_torch(array: np.ndarray) -> Tensor:
    """A copy of `array` in the type that it is computed in."""
    dtype = torch_type(array.dtype)
    host = array.astype(str(dtype).removeprefix("torch."), copy=True)
    return torch.from_numpy(np.ascontiguousarray(host).reshape(array.shape))


def ints(values: Tensor | Iterable[int]) -> list[int]:
    """Python integers, from an attribute or from a tensor of axes, sizes or shape."""
    return [int(v) for v in (values.reshape(-1).tolist() if isinstance(values, Tensor) else values)]
