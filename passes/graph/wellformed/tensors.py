"""Checks tensors and types of an ONNX file: values that fill the shape, types that ONNX defines."""

from __future__ import annotations

import math

import onnx
from onnx import TensorProto, TypeProto

from trimtab.passes.graph.weights import byte_size
from trimtab.passes.graph.wellformed.fault import MalformedError, name_of

_TYPES = frozenset(TensorProto.DataType.values()) - {TensorProto.UNDEFINED}
_COMPLEX = {TensorProto.COMPLEX64, TensorProto.COMPLEX128}  # each value takes two entries of the typed field
_FLOAT6 = {
    TensorProto.FLOAT6E2M3,
    TensorProto.FLOAT6E3M2,
}  # packed as bytes, but one per entry of the typed field


def check_tensor(tensor: TensorProto) -> None:
    """Check that a tensor has a type, a shape, and the values that both need. External values are checked on reading.

    Raises:
        MalformedError: the message names the tensor.
    """
    what = f"tensor {name_of(tensor.name)}"
    if tensor.data_type not in _TYPES:
        raise MalformedError(f"{what} has the unknown type {tensor.data_type}")
    if any(n < 0 for n in tensor.dims):
        raise MalformedError(f"{what} has the shape {list(tensor.dims)[:8]}")
    if tensor.HasField("segment"):
        raise MalformedError(f"{what} is stored in segments, which no runtime reads")
    if tensor.data_location == TensorProto.EXTERNAL:
        return
    count, needed = math.prod(tensor.dims), byte_size(tensor)
    if tensor.data_type == TensorProto.STRING:
        needed, present, unit = count, len(tensor.string_data), "strings"
    elif tensor.HasField("raw_data"):
        present, unit = len(tensor.raw_data), "bytes"
    else:
        field = getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type))
        packed = needed < count and tensor.data_type not in _FLOAT6  # an entry of int32_data contains a byte of values
        needed = needed if packed else count * (2 if tensor.data_type in _COMPLEX else 1)
        present, unit = len(field), "values"
    if present != needed:
        raise MalformedError(f"{what} has {present} {unit}, but its shape {list(tensor.dims)[:8]} needs {needed}")


def check_type(kind: TypeProto, what: str) -> None:
    """Check that the type of an input or output has an element type that ONNX defines, and sizes of -1 (any) or more.

    Raises:
        MalformedError: the message names `what`, the input or output.
    """
    form = kind.WhichOneof("value")
    if form is None:
        raise MalformedError(f"{what} has no type")
    if form in ("tensor_type", "sparse_tensor_type"):
        tensor = getattr(kind, form)
        if tensor.elem_type not in _TYPES:
            raise MalformedError(f"{what} has the element type {tensor.elem_type}, which ONNX does not define")
        if any(dim.HasField("dim_value") and dim.dim_value < -1 for dim in tensor.shape.dim):
            raise MalformedError(f"{what} has a negative size")
    elif form in ("sequence_type", "optional_type"):
        check_type(getattr(kind, form).elem_type, what)
    elif form == "map_type":
        check_type(kind.map_type.value_type, what)
