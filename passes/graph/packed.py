"""Dequantizes weights: constants of DequantizeLinear, com.microsoft MatMulNBits or Int4Linear, as floats."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.graph.weights import values
from trimtab.plugins.int4_linear import BLOCK as INT4_BLOCK


def dequantize_linear(node: gs.Node) -> np.ndarray:
    """(q - zero point) · scale, per tensor, per axis, or in blocks along the axis. Shape of q.

    Source: ONNX DequantizeLinear, opset 21.
    """
    q = values(node.inputs[0])
    scale = values(node.inputs[1]).astype(np.float32)
    zero = np.zeros(1, np.float32)
    if len(node.inputs) > 2 and node.inputs[2].name:
        zero = values(node.inputs[2]).astype(np.float32)
    axis = int(node.attrs.get("axis", 1))
    block = int(node.attrs.get("block_size", 0))

    def spread(part: np.ndarray) -> np.ndarray:
        if block and np.ndim(part) == q.ndim:
            return np.repeat(part, block, axis)[tuple(slice(n) for n in q.shape)]
        if np.size(part) == 1:
            return np.reshape(part, ())
        return part.reshape([-1 if i == axis % q.ndim else 1 for i in range(q.ndim)])

    return (q.astype(np.float32) - spread(zero)) * spread(scale)


def dequantize_blocks(node: gs.Node) -> np.ndarray:
    """W of a MatMulNBits as [N, K], float32: rows in blocks along K, low bits first, zero point 2^(bits-1) by default.

    Source: com.microsoft MatMulNBits in ONNX Runtime's ContribOperators.md.
    """
    n, k, bits = (int(node.attrs[key]) for key in ("N", "K", "bits"))
    block = int(node.attrs["block_size"])
    blocks = -(-k // block)
    q = _unpack(values(node.inputs[1]).reshape(n, -1), bits).reshape(n, blocks, block)
    scale = values(node.inputs[2]).astype(np.float32).reshape(n, blocks, 1)
    zero: np.ndarray | float = float(1 << (bits - 1))
    if len(node.inputs) > 3 and node.inputs[3].name:
        stored = values(node.inputs[3])
        packed = stored.dtype == np.uint8
        zero = (_unpack(stored.reshape(n, -1), bits)[:, :blocks] if packed else stored).reshape(n, blocks, 1)
    weight = (q.astype(np.float32) - zero) * scale
    return weight.reshape(n, blocks * block)[:, :k].astype(np.float32)


def dequantize_int4(node: gs.Node) -> np.ndarray:
    """W of an Int4Linear as [out_features, in_features], float32."""
    q = _unpack(values(node.inputs[1]), 4)
    scale = values(node.inputs[2]).astype(np.float32)
    weight: np.ndarray = (q.astype(np.float32) - 8) * np.repeat(scale, INT4_BLOCK, axis=1)
    return weight


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """[rows, bytes] → [rows, bytes · 8 / bits], the low bits of a byte first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(len(packed), -1)
