"""Merges equal weights: exporters store a shared matrix once for each layer that uses it."""

from __future__ import annotations

import math
import mmap
from collections.abc import Hashable, Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto
from onnx_graphsurgeon.exporters.onnx_exporter import dtype_to_onnx
from onnx_graphsurgeon.ir.tensor import LazyValues

from trimtab.passes.graph.edit import insert
from trimtab.passes.graph.weights import ExternalValues, values

_MIN_ELEMENTS = 64  # smaller constants are not compared
_GRID = 4  # rows and columns of a matrix that are compared first
_WINDOWS, _WINDOW = 16, 16  # windows of a constant that are compared first, and bytes of each
_CHUNK = 1 << 24  # bytes compared at a time
_ROWS = 1024  # rows compared at a time
_QUANTIZATION = frozenset(["DequantizeLinear", "QuantizeLinear"])
_FLOATS = frozenset([TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE])


def merge_copies(graph: gs.Graph) -> int:
    """Let all uses of equal constants read one of them; returns how many constants were merged.

    Constants are first compared in a few windows, and read whole only where these agree: a model without copies is not
    read. A constant of one repeated value (a new norm's ones, a new bias) is not merged: training may make such
    constants differ. Inputs of quantization ops are not merged, since ONNX Runtime fuses only those with a single use.
    """
    kept = {id(tensor) for tensor in graph.outputs}
    firsts: dict[Hashable, list[gs.Constant]] = {}
    merged = 0
    for constant in _candidates(graph):
        if id(constant) in kept:
            continue
        alike = firsts.setdefault((dtype_to_onnx(constant.dtype), tuple(constant.shape), _glance(constant)), [])
        same = next((first for first in alike if _equal(first, constant)), None)
        if same is None or _is_uniform(constant):
            alike.append(constant)
            continue
        _replace(constant, same)
        merged += 1
    return merged + _merge_transposed(graph)


def _merge_transposed(graph: gs.Graph) -> int:
    """Replace a matrix that equals another one transposed, such as the head of a tied embedding, by a Transpose."""
    matrices = [c for c in _candidates(graph) if len(c.shape) == 2 and dtype_to_onnx(c.dtype) in _FLOATS]
    shapes = {tuple(matrix.shape) for matrix in matrices}
    matrices = [matrix for matrix in matrices if tuple(matrix.shape[::-1]) in shapes]
    seen: dict[Hashable, list[gs.Constant]] = {}
    for matrix in matrices:
        seen.setdefault((matrix.dtype, tuple(matrix.shape), _grid(matrix).tobytes()), []).append(matrix)
    merged: set[int] = set()
    for copy in matrices:
        if not all(node.op in ("MatMul", "Gemm") and node.inputs[1] is copy for node in copy.outputs):
            continue  # other readers need the matrix as it is stored
        turned = (copy.dtype, tuple(copy.shape[::-1]), np.ascontiguousarray(_grid(copy).T).tobytes())
        for original in seen.get(turned, ()):
            if original is not copy and id(original) not in merged and _equal_transposed(original, copy):
                if _is_uniform(copy):
                    break
                _replace(copy, _transposed(graph, original))
                merged.add(id(copy))
                break
    return len(merged)


def _candidates(graph: gs.Graph) -> list[gs.Constant]:
    return [
        tensor
        for tensor in graph.tensors().values()
        if isinstance(tensor, gs.Constant)
        and math.prod(tensor.shape) > _MIN_ELEMENTS
        and dtype_to_onnx(tensor.dtype) != TensorProto.STRING
        and not any(node.op in _QUANTIZATION for node in tensor.outputs)
    ]


def _replace(old: gs.Constant, new: gs.Tensor) -> None:
    for consumer in list(old.outputs):
        consumer.inputs = [new if tensor is old else tensor for tensor in consumer.inputs]


def _transposed(graph: gs.Graph, matrix: gs.Constant) -> gs.Tensor:
    """The output of a Transpose of `matrix`: one that the graph already has, or a new one."""
    for node in matrix.outputs:
        if node.op == "Transpose" and not node.domain and node.attrs.get("perm", [1, 0]) == [1, 0]:
            return node.outputs[0]
    name = f"canonicalize/{matrix.name}/transposed"
    y = insert(graph, "Transpose", [matrix], name, attrs={"perm": [1, 0]}, dtype=matrix.dtype)
    y.shape = list(matrix.shape[::-1])
    return y


def _raw(constant: gs.Constant) -> np.ndarray:
    """The bytes of the values, [bytes], uint8; memory-mapped if they are stored in a file."""
    stored = constant._values
    if isinstance(stored, ExternalValues):
        return stored.raw()
    if isinstance(stored, LazyValues):
        if stored.tensor.HasField("raw_data"):
            return np.frombuffer(stored.tensor.raw_data, np.uint8)
        return np.frombuffer(onnx.numpy_helper.from_array(stored.load()).raw_data, np.uint8)
    return np.ascontiguousarray(stored).reshape(-1).view(np.uint8)


def _glance(constant: gs.Constant) -> bytes:
    """Some bytes of the constant, from both ends and between."""
    raw = _at_random(_raw(constant))
    starts = np.linspace(0, max(len(raw) - _WINDOW, 0), _WINDOWS, dtype=np.int64)
    return b"".join(raw[start : start + _WINDOW].tobytes() for start in starts)


def _grid(matrix: gs.Constant) -> np.ndarray:
    rows, columns = (np.linspace(0, size - 1, min(size, _GRID), dtype=np.int64) for size in matrix.shape)
    return np.ascontiguousarray(_at_random(values(matrix))[np.ix_(rows, columns)])


def _at_random(array: np.ndarray) -> np.ndarray:
    """`array`; if it is mapped from a file, read-ahead is switched off for it."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    return array


def _equal(first: gs.Constant, second: gs.Constant) -> bool:
    stored = first._values, second._values
    if all(isinstance(v, ExternalValues) for v in stored):
        places = {(v.path, v.offset) for v in stored}
        if len(places) == 1:
            return True
    a, b = _raw(first), _raw(second)
    return len(a) == len(b) and all(np.array_equal(a[part], b[part]) for part in _parts(len(a), _CHUNK))


def _equal_transposed(first: gs.Constant, second: gs.Constant) -> bool:
    a, b = (_bits(values(constant)) for constant in (first, second))
    return all(np.array_equal(a[part], b[:, part].T) for part in _parts(len(a), _ROWS))


def _is_uniform(constant: gs.Constant) -> bool:
    flat = _bits(values(constant)).reshape(-1)
    first = flat[0]
    return all(bool((flat[part] == first).all()) for part in _parts(len(flat), _CHUNK))


def _bits(array: np.ndarray) -> np.ndarray:
    """The elements viewed as integers, to compare them bit by bit."""
    return array.view(f"u{array.dtype.itemsize}")


def _parts(size: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, size, step))
