"""The forms a weight matrix can take: each knows its values, bytes and cost, and how a graph multiplies with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from trimtab.passes.graph import constant, insert


class Matrix(ABC):
    """W of y = x W, [in_features, out_features]."""

    __array_ufunc__ = None  # so that `array @ matrix` asks the matrix

    @property
    @abstractmethod
    def array(self) -> np.ndarray:
        """The values that the graph multiplies with, float32."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes as stored."""

    @property
    @abstractmethod
    def macs(self) -> int:
        """Multiply-adds per token."""

    def __rmatmul__(self, x: np.ndarray) -> np.ndarray:
        """x W."""
        y: np.ndarray = x @ self.array
        return y

    def joined(self, other: Matrix, axis: int) -> Matrix | None:
        """Both matrices in one, side by side (axis 1) or one below the other (axis 0); None if their forms differ."""
        return None

    @abstractmethod
    def emit(self, graph: gs.Graph, x: gs.Tensor, name: str, dtype: np.dtype) -> gs.Variable:
        """Append nodes called `name`... that compute x W in `dtype`; returns their output."""


@dataclass(frozen=True)
class Dense(Matrix):
    """As it is, in the graph's own precision."""

    weight: np.ndarray

    def columns(self, part: slice) -> Dense:
        """The matrix of some output features."""
        return Dense(self.weight[:, part])

    def joined(self, other: Matrix, axis: int) -> Dense | None:
        return Dense(np.concatenate([self.weight, other.weight], axis)) if isinstance(other, Dense) else None

    @property
    def array(self) -> np.ndarray:
        return self.weight

    @property
    def nbytes(self) -> int:
        return 4 * self.weight.size

    @property
    def macs(self) -> int:
        return self.weight.size

    def emit(self, graph: gs.Graph, x: gs.Tensor, name: str, dtype: np.dtype) -> gs.Variable:
        return insert(graph, "MatMul", [x, constant(f"{name}.weight", self.weight.astype(dtype))], name, dtype=dtype)


@dataclass(frozen=True)
class Half(Matrix):
    """Stored as float16, multiplied in the graph's precision: half the bytes on disk, the same time."""

    weight: np.ndarray

    def joined(self, other: Matrix, axis: int) -> Half | None:
        return Half(np.concatenate([self.weight, other.weight], axis)) if isinstance(other, Half) else None

    @property
    def array(self) -> np.ndarray:
        return self.weight.astype(np.float16).astype(np.float32)

    @property
    def nbytes(self) -> int:
        return 2 * self.weight.size

    @property
    def macs(self) -> int:
        return self.weight.size

    def emit(self, graph: gs.Graph, x: gs.Tensor, name: str, dtype: np.dtype) -> gs.Variable:
        stored: gs.Tensor = constant(f"{name}.weight", self.weight.astype(np.float16))
        if dtype != np.float16:
            to = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
            stored = insert(graph, "Cast", [stored], f"{name}/cast", attrs={"to": to}, dtype=dtype)
        return insert(graph, "MatMul", [x, stored], name, dtype=dtype)


@dataclass(frozen=True)
class Quantized(Matrix):
    """Symmetric integers with one scale per block of input features and output feature.

    Attributes:
        q: integers in [-2^(bits-1), 2^(bits-1) - 1], [in_features, out_features], int8.
        scale: [blocks, out_features], float32.
        bits: 8, 4 or 2.
        block: input features that share a scale.
    """

    q: np.ndarray
    scale: np.ndarray
    bits: int
    block: int

    @property
    def array(self) -> np.ndarray:
        return self.q * np.repeat(self.scale, self.block, axis=0)[: len(self.q)]

    def columns(self, part: slice) -> Quantized:
        """The matrix of some output features; they are independent of each other."""
        return Quantized(self.q[:, part], self.scale[:, part], self.bits, self.block)

    @property
    def nbytes(self) -> int:
        return self.q.size * self.bits // 8 + 4 * self.scale.size

    @property
    def macs(self) -> int:
        return self.q.size

    def emit(self, graph: gs.Graph, x: gs.Tensor, name: str, dtype: np.dtype) -> gs.Variable:
        # The standard's own form, which every runtime reads; ONNX Runtime fuses it into one MatMulNBits.
        kind = {8: onnx.TensorProto.INT8, 4: onnx.TensorProto.INT4, 2: onnx.TensorProto.INT2}[self.bits]
        q = onnx.helper.make_tensor("", kind, self.q.shape, pack(self.q, self.bits), raw=True)
        parts = [constant(f"{name}.weight", q), constant(f"{name}.scale", self.scale.astype(dtype))]
        attrs: dict[str, object] = {"axis": 0, "block_size": self.block}
        weight = insert(graph, "DequantizeLinear", parts, f"{name}/dequantize", attrs=attrs, dtype=dtype)
        return insert(graph, "MatMul", [x, weight], name, dtype=dtype)


@dataclass(frozen=True)
class LowRank(Matrix):
    """A product of two thin matrices: [in_features, rank] and [rank, out_features]."""

    left: Matrix
    right: Matrix

    @property
    def rank(self) -> int:
        return int(self.left.array.shape[1])

    @property
    def array(self) -> np.ndarray:
        return self.left.array @ self.right.array

    def __rmatmul__(self, x: np.ndarray) -> np.ndarray:
        return (x @ self.left) @ self.right

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes

    @property
    def macs(self) -> int:
        return self.left.macs + self.right.macs

    def emit(self, graph: gs.Graph, x: gs.Tensor, name: str, dtype: np.dtype) -> gs.Variable:
        thin = self.left.emit(graph, x, f"{name}/left", dtype)
        return self.right.emit(graph, thin, f"{name}/right", dtype)


def pack(q: np.ndarray, bits: int) -> bytes:
    """ONNX's packing of sub-byte integers: row-major, the first value in the lowest bits of its byte."""
    flat = np.ascontiguousarray(q, np.int8).reshape(-1)
    if bits == 8:
        return flat.tobytes()
    per_byte = 8 // bits
    flat = np.pad(flat, (0, -len(flat) % per_byte)).reshape(-1, per_byte).view(np.uint8) & ((1 << bits) - 1)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(flat << shifts, axis=1).astype(np.uint8).tobytes()
