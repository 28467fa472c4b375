"""Sparse weights of an ONNX file as dense ones: graphsurgeon 0.6 reads no others."""

from __future__ import annotations

import math

import numpy as np
from onnx import GraphProto, SparseTensorProto, TensorProto, numpy_helper

from trimtab.passes.errors import ModelError, quoted

MAX_BYTES = 1 << 30
"""Maximum bytes of a sparse weight with its zeros, which a few bytes of a file can stand for."""

_HINT = "store it as a dense tensor: the same values, with its zeros"


def densify(graph: GraphProto) -> None:
    """Make each sparse initializer of `graph` a dense one, in place.

    Raises:
        ModelError: a sparse initializer is damaged, too large or in a file of its own; names it.
    """
    for weight in graph.sparse_initializer:
        graph.initializer.append(numpy_helper.from_array(_dense(weight), weight.values.name))
    del graph.sparse_initializer[:]


def _dense(weight: SparseTensorProto) -> np.ndarray:
    name, dims = f"the sparse initializer {quoted(weight.values.name)}", tuple(weight.dims)
    if TensorProto.EXTERNAL in (weight.values.data_location, weight.indices.data_location):
        raise ModelError(f"{name} has values in another file, where trimtab reads none", hint=_HINT)
    try:
        values, indices = numpy_helper.to_array(weight.values), numpy_helper.to_array(weight.indices)
    except Exception as error:  # onnx raises errors of many types for damaged tensors
        raise ModelError(f"{name} is damaged ({error})", hint=_HINT) from error
    size = math.prod(dims)
    if size * values.dtype.itemsize > MAX_BYTES or values.dtype.kind in "OSU":
        raise ModelError(
            f"{name} is {values.dtype} {list(dims)}: with its zeros, numbers of at most {MAX_BYTES} bytes are read",
            hint=_HINT,
        )
    along = indices.T if indices.ndim == 2 else indices
    whole = min(dims, default=0) > 0 and values.ndim == 1 and indices.dtype == np.int64
    if not whole or along.shape not in ((len(values),), (len(dims), len(values))):
        raise ModelError(
            f"{name} has {list(values.shape)} values of {list(dims)} at {indices.dtype} {list(indices.shape)} places",
            hint=_HINT,
        )
    limits = np.array([size] if indices.ndim == 1 else dims).reshape(-1, *[1] * (indices.ndim - 1))
    if ((along < 0) | (along >= limits)).any():
        raise ModelError(f"{name} has a value outside its dimensions {list(dims)}", hint=_HINT)
    dense = np.zeros(size, values.dtype)
    dense[along if indices.ndim == 1 else np.ravel_multi_index(tuple(along), dims)] = values
    return dense.reshape(dims)
