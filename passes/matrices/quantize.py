"""Blockwise symmetric integers: round to nearest, or with the rounding error fed forward along the inputs."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from scipy.linalg import cholesky, solve_triangular

from trimtab.passes.matrices.forms import Dense, Matrix, Quantized
from trimtab.passes.matrices.in_range import in_range

_SHRINK = np.linspace(0.7, 1.0, 13)  # clipping the largest weight of a block a little often lowers the block's error
TYPICAL = 0.9
"""Clipping, relative to the largest weight of a block, that is good on average without a search."""
_BITS = {"int8": 8, "int4": 4}
_DAMP = 0.01  # of the mean diagonal, so that unused inputs do not make the second moments singular


def fit_block(block: int, in_features: int) -> int | None:
    """The largest block size up to `block` that divides `in_features`; None below 16, the smallest block of kernels."""
    sizes = (size for size in (256, 128, 64, 32, 16) if size <= block and in_features % size == 0)
    return next(sizes, None)


def round_to_nearest(
    weight: np.ndarray, bits: int, block: int, *, search: bool = True, by_largest: bool = False
) -> Quantized:
    """Round each block by itself, with the scale of least squared error.

    Args:
        weight: [in_features, out_features]; in_features is a multiple of `block`.
        search: try several scales; otherwise use one that is good on average.
        by_largest: use the scale of `scale_by_largest` instead, which may be negative.
    """
    blocks = weight.reshape(-1, block, weight.shape[1]).astype(np.float32)
    if by_largest:
        scale = scale_by_largest(blocks, bits, axis=1)[:, 0]
    else:
        scale = np.stack([_scale(part, bits, _SHRINK if search else np.array([TYPICAL])) for part in blocks])
    q = _round(blocks, scale[:, None], bits).reshape(weight.shape)
    return Quantized(q.astype(np.int8), scale, bits, block)


def scale_by_largest(blocks: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Scales that map the value of largest size to the smallest integer, as in GGML's Q4_0; 1 for blocks of zeros.

    All levels are used, and the largest value is exact up to bfloat16. SmolLM2-135M in int4, converted from Q4_1, has a
    perplexity of 38.9 with these scales, and 42.3 to 47.1 with scales of least squared error, although the latter are
    closer to its weights. For MiniLM, whose weights were never quantized, the error equals that of searched positive
    scales; searched signed scales would lower it by 14 %.

    Args:
        blocks: values along `axis` share a scale; the result keeps this axis.
    """
    largest = np.take_along_axis(blocks, np.expand_dims(np.abs(blocks).argmax(axis), axis), axis)
    return _short(np.where(largest != 0, largest / -(2 ** (bits - 1)), 1), bits)


def in_form(weight: np.ndarray, form: str, block: int, *, search: bool = False) -> Matrix:
    """`weight` in fp32, or in int8 or int4 in blocks; in fp32 if no block size divides its inputs.

    Args:
        block: maximum number of inputs that share a scale.
        search: as in `round_to_nearest`.
    """
    size = fit_block(block, len(weight)) if form in _BITS else None
    return Dense(weight) if size is None else round_to_nearest(weight, _BITS[form], size, search=search)


@in_range()
def with_feedback(weight: np.ndarray, bits: int, block: int, moments: np.ndarray) -> Quantized:
    """Round row by row, and let later rows compensate the error of each row.

    Source: Frantar et al., GPTQ (arXiv 2210.17323), algorithm 1.

    Args:
        weight: [in_features, out_features]; in_features is a multiple of `block`.
        moments: E[x xᵀ] of the inputs, [in_features, in_features].
    """
    w = weight.astype(np.float64, copy=True)
    n = len(w)
    damp = _DAMP * np.mean(np.diag(moments)) or 1.0  # of inputs that are always 0, any rounding is right
    damped = moments.astype(np.float64) + damp * np.eye(n)
    root = cholesky(damped, lower=True)
    inverse_root = solve_triangular(root, np.eye(n), lower=True)
    factor = cholesky(inverse_root.T @ inverse_root, lower=False)  # of the inverse: U with UᵀU = H⁻¹
    q = np.empty(w.shape, np.int8)
    scale = np.empty((n // block, w.shape[1]), np.float32)
    for start in range(0, n, block):
        stop = start + block
        scale[start // block] = s = _scale(w[start:stop].astype(np.float32), bits, _SHRINK)
        errors = np.empty((block, w.shape[1]))
        for i in range(start, stop):
            q[i] = _round(w[i], s, bits)
            errors[i - start] = (w[i] - q[i] * s) / factor[i, i]
            w[i + 1 : stop] -= np.outer(factor[i, i + 1 : stop], errors[i - start])
        w[stop:] -= factor[start:stop, stop:].T @ errors
    return Quantized(q, scale, bits, block)


def _scale(block: np.ndarray, bits: int, shrinks: np.ndarray) -> np.ndarray:
    """For each column of `block`, the scale with the least squared rounding error, [out_features], float32."""
    top = np.maximum(np.abs(block).max(0), 1e-12) / (2 ** (bits - 1) - (0.5 if bits == 2 else 1))
    best, least_error = _short(top, bits), np.full(top.shape, np.inf, np.float32)
    for shrink in shrinks if bits < 8 else (1.0,):
        tried = _short(top * np.float32(shrink), bits)
        error = np.square(_round(block, tried, bits) * tried - block).sum(0)
        best, least_error = np.where(error < least_error, tried, best), np.minimum(error, least_error)
    return best


def _short(scale: np.ndarray, bits: int) -> np.ndarray:
    """Scales of int4 rounded to bfloat16 (at most 0.4 % off), and other scales unchanged; 1 in place of 0.

    Int4Linear stores bfloat16 scales: 4.5 bits per weight in blocks of 32, instead of 5.
    """
    rounded = scale.astype(np.float32)
    if bits == 4:
        rounded = rounded.astype(ml_dtypes.bfloat16).astype(np.float32)
    return np.where(rounded != 0, rounded, np.float32(1))


def _round(weight: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    return np.clip(np.rint(weight / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
