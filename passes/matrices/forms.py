"""The stored forms of a weight matrix, each with its values, bytes, cost, and the nodes that multiply with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from trimtab.passes.graph import constant, insert

Product = Callable[[gs.Graph, gs.Tensor, str], gs.Variable]
"""Appends nodes that multiply a tensor with a stored matrix; the last argument is their name. Returns the output."""

OPSETS = {"int8": 21, "int4": 21, "int2": 25}
"""Form → the first opset whose DequantizeLinear supports such weights in blocks."""

INTEGER_ACTIVATIONS = 4  # the `accuracy_level` that ONNX Runtime sets when it fuses DequantizeLinear into MatMulNBits


class Matrix(ABC):
    """W of y = x W, [in_features, out_features]."""

    __array_ufunc__ = None  # so that `array @ matrix` calls __rmatmul__

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
    def store(self, name: str, dtype: np.dtype, uses: int = 1) -> Product:
        """Create the constants `name`... of x W in `dtype`, which all products with the matrix share.

        Args:
            uses: the number of products.
        """

    def emit(self, graph: gs.Graph, x: gs.Tensor, name: str, dtype: np.dtype) -> gs.Variable:
        """Append nodes `name`... that compute x W in `dtype`; returns their output."""
        return self.store(name, dtype)(graph, x, name)


@dataclass(frozen=True)
class Dense(Matrix):
    """A plain matrix in the graph's own precision."""

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

    def store(self, name: str, dtype: np.dtype, uses: int = 1) -> Product:
        stored = constant(f"{name}.weight", self.weight.astype(dtype))
        return lambda graph, x, at: insert(graph, "MatMul", [x, stored], at, dtype=dtype)


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

    def store(self, name: str, dtype: np.dtype, uses: int = 1) -> Product:
        stored = constant(f"{name}.weight", self.weight.astype(np.float16))
        to = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

        def widened(graph: gs.Graph) -> gs.Tensor:
            if dtype == np.float16:
                return stored
            if stored.outputs:
                cast: gs.Tensor = stored.outputs[0].outputs[0]
                return cast
            return insert(graph, "Cast", [stored], f"{name}/cast", attrs={"to": to}, dtype=dtype)

        return lambda graph, x, at: insert(graph, "MatMul", [x, widened(graph)], at, dtype=dtype)


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

    def store(self, name: str, dtype: np.dtype, uses: int = 1) -> Product:
        return self._in_standard_form(name, dtype) if uses == 1 else self._for_several(name, dtype)

    def _in_standard_form(self, name: str, dtype: np.dtype) -> Product:
        """DequantizeLinear and MatMul, which every runtime supports; ONNX Runtime fuses them into one MatMulNBits."""
        kind = {8: onnx.TensorProto.INT8, 4: onnx.TensorProto.INT4, 2: onnx.TensorProto.INT2}[self.bits]
        q = onnx.helper.make_tensor("", kind, self.q.shape, pack(self.q, self.bits), raw=True)
        parts = [constant(f"{name}.weight", q), constant(f"{name}.scale", self.scale.astype(dtype))]
        attrs: dict[str, object] = {"axis": 0, "block_size": self.block}

        def product(graph: gs.Graph, x: gs.Tensor, at: str) -> gs.Variable:
            weight = insert(graph, "DequantizeLinear", parts, f"{at}/dequantize", attrs=attrs, dtype=dtype)
            return insert(graph, "MatMul", [x, weight], at, dtype=dtype)

        return product

    def _for_several(self, name: str, dtype: np.dtype) -> Product:
        """MatMulNBits, since ONNX Runtime 1.31 fuses no DequantizeLinear whose integers or scales are used twice.

        Without fusion, such products of 1024 features take 8 to 120 times as long.
        """
        k, n = self.q.shape
        attrs: dict[str, object] = {
            "K": k, "N": n, "bits": self.bits, "block_size": self.block, "accuracy_level": INTEGER_ACTIVATIONS,
        }  # fmt: skip
        centre = 1 << (self.bits - 1)  # the unsigned integer that represents zero
        q = (np.ascontiguousarray(self.q.T).view(np.uint8) + np.uint8(centre)) & np.uint8(2 * centre - 1)
        packed = np.frombuffer(pack(q.view(np.int8), self.bits), np.uint8).reshape(n, k // self.block, -1)
        parts = [constant(f"{name}.weight", packed), constant(f"{name}.scale", self.scale.T.astype(dtype))]

        def product(graph: gs.Graph, x: gs.Tensor, at: str) -> gs.Variable:
            return insert(graph, "MatMulNBits", [x, *parts], at, attrs=attrs, domain="com.microsoft", dtype=dtype)

        return product


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

    def store(self, name: str, dtype: np.dtype, uses: int = 1) -> Product:
        left, right = (
            m.store(f"{name}/{side}", dtype, uses) for m, side in ((self.left, "left"), (self.right, "right"))
        )
        return lambda graph, x, at: right(graph, left(graph, x, f"{at}/left"), f"{at}/right")


def pack(q: np.ndarray, bits: int) -> bytes:
    """ONNX's packing of sub-byte integers: row-major, the first value in the lowest bits of its byte."""
    flat = np.ascontiguousarray(q, np.int8).reshape(-1)
    if bits == 8:
        return flat.tobytes()
    per_byte = 8 // bits
    flat = np.pad(flat, (0, -len(flat) % per_byte)).reshape(-1, per_byte).view(np.uint8) & ((1 << bits) - 1)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(flat << shifts, axis=1).astype(np.uint8).tobytes()
