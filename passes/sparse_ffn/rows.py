"""An FFN's weights in the layout of the sparse ops: one row per neuron, in the type of the option `weights`."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from trimtab.passes.graph import constant
from trimtab.passes.graph.linear import Linear
from trimtab.passes.matrices.quantize import scale_by_largest

RowForm = Literal["fp32", "fp16", "bf16", "int8", "int4"]

INT4_BLOCK = 32
"""Inputs that share a scale."""

_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5 + 4 / INT4_BLOCK}


def row_bytes(form: RowForm, width: int) -> float:
    """Bytes of one row, including its scales."""
    return _BYTES[form] * width + (4 if form == "int8" else 0)


def row_constants(weight: np.ndarray, form: RowForm, label: str, name: str) -> dict[str, gs.Constant]:
    """The inputs `label` and, for integers, `label`_scale of a sparse op.

    Args:
        weight: [neurons, width].
        name: prefix of the constants' names, before the label.
    """
    if form == "fp32":
        return {label: constant(f"{name}/{label}", np.ascontiguousarray(weight, np.float32))}
    if form == "fp16":
        return {label: constant(f"{name}/{label}", weight.astype(np.float16))}
    if form == "bf16":
        return {label: constant(f"{name}/{label}", _bfloat16(weight))}
    q, scale = quantize_rows(weight) if form == "int8" else quantize_blocks(weight)
    return {label: constant(f"{name}/{label}", q), f"{label}_scale": constant(f"{name}/{label}_scale", scale)}


class Rows:
    """Weights as of `row_constants`. FFNs that share a matrix share its constants."""

    def __init__(self, form: RowForm) -> None:
        self.form = form
        self._constants: dict[tuple[int, bool, bool], list[gs.Constant]] = {}
        self._bytes = 0.0

    @property
    def nbytes(self) -> float:
        """Bytes of all constants so far."""
        return self._bytes

    def of(self, linear: Linear, weight: np.ndarray, label: str, name: str) -> dict[str, gs.Tensor]:
        """The constants of `row_constants` for `weight`, the rows of `linear`."""
        key = id(linear.weight), linear.transposed, False
        if key not in self._constants:
            self._constants[key] = list(row_constants(weight, self.form, label, name).values())
            self._bytes += row_bytes(self.form, weight.shape[1]) * len(weight)
        return dict(zip((label, f"{label}_scale"), self._constants[key], strict=False))

    def whole(self, linear: Linear, weight: np.ndarray, label: str, name: str) -> gs.Constant:
        """`weight` of `linear`, [width, neurons], float32, as the constant of one MatMul over all neurons."""
        key = id(linear.weight), linear.transposed, True
        if key not in self._constants:
            self._constants[key] = [constant(f"{name}/{label}", np.asarray(weight, np.float32))]
            self._bytes += 4 * weight.size
        return self._constants[key][0]


def quantize_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [neurons, width] and a scale for each row, [neurons]."""
    scale = (np.abs(weight).max(1) / 127).astype(np.float32)
    safe = np.where(scale > 0, scale, 1)
    return np.clip(np.rint(weight / safe[:, None]), -127, 127).astype(np.int8), scale


def quantize_blocks(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int4 with zero point 8, two per byte, uint8 [neurons, width / 2], and scales [neurons, width / 32].

    The value of largest magnitude in a block becomes -8.
    """
    blocks = weight.reshape(len(weight), -1, INT4_BLOCK)
    scale = scale_by_largest(blocks, 4, axis=-1)
    q = (np.clip(np.rint(blocks / scale), -8, 7) + 8).astype(np.uint8).reshape(weight.shape)
    return q[:, 0::2] | (q[:, 1::2] << 4), scale[..., 0]


def _bfloat16(weight: np.ndarray) -> onnx.TensorProto:
    bits = np.ascontiguousarray(weight, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return onnx.helper.make_tensor("", onnx.TensorProto.BFLOAT16, weight.shape, rounded.tobytes(), raw=True)
