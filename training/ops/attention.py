"""Attention as one operator, rotary embeddings, and dequantised weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trimtab.passes.errors import ModelError


def rotary_embedding(
    x: Tensor, cos_cache: Tensor, sin_cache: Tensor, position_ids: Tensor | None = None, *,
    interleaved: int = 0, num_heads: int = 0, rotary_embedding_dim: int = 0,
) -> Tensor:  # fmt: skip
    """RotaryEmbedding (opset 23) of x [B, H, T, D] or [B, T, H·D].

    Caches are [P, R/2], or [B, T, R/2] without positions.
    """
    flat = x.dim() == 3
    heads = x.unflatten(-1, (num_heads, -1)) if flat else x.transpose(1, 2)  # [B, T, H, D]
    width = rotary_embedding_dim or heads.shape[-1]
    if position_ids is not None:
        cos_cache, sin_cache = cos_cache[position_ids], sin_cache[position_ids]
    cos, sin = cos_cache[..., : width // 2].unsqueeze(-2), sin_cache[..., : width // 2].unsqueeze(-2)
    turned, kept = heads[..., :width], heads[..., width:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = turned.chunk(2, -1)
    real, imaginary = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack((real, imaginary), -1).flatten(-2) if interleaved else torch.cat((real, imaginary), -1)
    y = torch.cat((turned, kept), -1)
    return y.flatten(-2) if flat else y.transpose(1, 2)


def attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, past_key: Tensor | None = None,
    past_value: Tensor | None = None, *, is_causal: int = 0, kv_num_heads: int | None = None,
    q_num_heads: int | None = None, scale: float | None = None, softcap: float = 0.0,
    qk_matmul_output_mode: int = 0, softmax_precision: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Attention (opset 23) on [B, H, T, D] or [B, T, H·D]; with fewer key heads than query heads, keys are shared."""
    flat = q.dim() == 3
    if flat:
        q = q.unflatten(-1, (q_num_heads, -1)).transpose(1, 2)
        k = k.unflatten(-1, (kv_num_heads, -1)).transpose(1, 2)
        v = v.unflatten(-1, (kv_num_heads, -1)).transpose(1, 2)
    if past_key is not None and past_value is not None:
        k, v = torch.cat((past_key, k), 2), torch.cat((past_value, v), 2)
    if is_causal:
        causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        attn_mask = causal if attn_mask is None else _masked(attn_mask, causal)
    shared = q.shape[1] != k.shape[1]
    if softcap:
        raise NotImplementedError(f"softcap={softcap}")
    y = functional.scaled_dot_product_attention(q, k, v, attn_mask, scale=scale, enable_gqa=shared)
    return (y.transpose(1, 2).flatten(-2) if flat else y), k, v


def _masked(mask: Tensor, causal: Tensor) -> Tensor:
    return mask & causal if mask.dtype == torch.bool else mask.masked_fill(~causal, -torch.inf)


def group_query_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, past_key: Tensor | None, past_value: Tensor | None,
    seqlens_k: Tensor, total_sequence_length: Tensor, cos_cache: Tensor | None = None,
    sin_cache: Tensor | None = None, *unused: Tensor | None, num_heads: int, kv_num_heads: int,
    scale: float | None = None, local_window_size: int = -1, softcap: float = 0.0, do_rotary: int = 0,
    rotary_interleaved: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """ONNX Runtime's GroupQueryAttention over a whole text at once: causal, rows padded on the right.

    Args:
        q: [B, T, H·D], or queries, keys and values side by side, [B, T, (H + 2 H_kv)·D], where `k` and `v` are None.
        seqlens_k: [B], number of real tokens less one.
    """
    if (
        (past_key is not None and past_key.numel())
        or softcap
        or local_window_size > 0
        or any(t is not None for t in unused)
    ):
        raise NotImplementedError("a filled cache, a window, a soft cap, given positions, a bias or a sink")
    if k is None or v is None:
        q, k, v = q.unflatten(-1, (num_heads + 2 * kv_num_heads, -1)).split((num_heads, kv_num_heads, kv_num_heads), 2)
    else:
        q, k, v = (t.unflatten(-1, (n, -1)) for t, n in ((q, num_heads), (k, kv_num_heads), (v, kv_num_heads)))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    tokens = torch.arange(q.shape[2], device=q.device)
    if do_rotary and cos_cache is not None and sin_cache is not None:
        positions = tokens.expand(q.shape[0], -1)
        width = 2 * cos_cache.shape[-1]
        q, k = (
            rotary_embedding(
                t, cos_cache, sin_cache, positions, interleaved=rotary_interleaved, rotary_embedding_dim=width
            )
            for t in (q, k)
        )
    seen = (tokens <= tokens[:, None]) & (tokens <= seqlens_k.reshape(-1, 1, 1, 1))
    y = functional.scaled_dot_product_attention(
        q, k, v, seen, scale=scale or None, enable_gqa=num_heads != kv_num_heads
    )
    return y.transpose(1, 2).flatten(-2), k, v


def dequantize_linear(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *,
    axis: int = 1, block_size: int = 0, output_dtype: int = 0,
) -> Tensor:  # fmt: skip
    """(x - zero_point) · scale, with one scale for all, one per index of `axis`, or one per block along `axis`."""

    def along(t: Tensor) -> Tensor:
        if block_size:
            return t.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])
        if t.dim() == 1 and x.dim() > 1:
            return t.reshape([-1 if d == axis % x.dim() else 1 for d in range(x.dim())])
        return t

    values = x.to(scale.dtype)
    if zero_point is not None:
        values = values - along(zero_point.to(scale.dtype))
    return values * along(scale)


def matmul_n_bits(
    x: Tensor, packed: Tensor, scale: Tensor, zero_points: Tensor | None = None, groups: Tensor | None = None,
    bias: Tensor | None = None, *, K: int, N: int, bits: int = 4, block_size: int, accuracy_level: int = 0,
) -> Tensor:  # fmt: skip
    """x W + b of unsigned integers in blocks along K, [N, blocks, bytes], low bits first, zero in their middle."""
    if zero_points is not None or groups is not None:
        raise ModelError("training does not know MatMulNBits with zero points or groups", hint="give the dense model")
    shifts = torch.arange(0, 8, bits, device=packed.device)
    q = (packed.reshape(N, -1, block_size * bits // 8, 1).long() >> shifts) & ((1 << bits) - 1)
    centred = q.reshape(N, -1, block_size).to(scale.dtype) - (1 << (bits - 1))
    weight = (centred * scale.reshape(N, -1, 1)).reshape(N, -1)[:, :K]
    y = x @ weight.to(x.dtype).T
    return y if bias is None else y + bias


_PLAIN: dict[str, Callable[..., Any]] = {
    "Attention": attention, "DequantizeLinear": dequantize_linear, "RotaryEmbedding": rotary_embedding,
}  # fmt: skip

_MICROSOFT: dict[str, Callable[..., Any]] = {
    "GroupQueryAttention": group_query_attention, "MatMulNBits": matmul_n_bits,
}  # fmt: skip

OPS = {("", name): op for name, op in _PLAIN.items()} | {("com.microsoft", name): op for name, op in _MICROSOFT.items()}
