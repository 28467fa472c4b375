"""Arithmetic, activations, reductions, products and normalisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trimtab.training.ops.dtypes import ints, torch_type

Axes = Tensor | Sequence[int] | None


def div(a: Tensor, b: Tensor) -> Tensor:
    """Integers are divided with truncation toward zero."""
    whole = not (a.is_floating_point() or b.is_floating_point())
    return torch.div(a, b, rounding_mode="trunc" if whole else None)


def power(a: Tensor, b: Tensor) -> Tensor:
    return torch.pow(a, b).to(a.dtype)


def mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Max, Min, Sum take any number of inputs."""
    return lambda *inputs: reduce(function, inputs)


def cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return x.to(torch_type(to))


def cast_like(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return x.to(like.dtype)


def clip(x: Tensor, min: Tensor | None = None, max: Tensor | None = None) -> Tensor:
    return x if min is None and max is None else torch.clamp(x, min, max)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return functional.gelu(x, approximate=approximate)


def quick_gelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    return x * torch.sigmoid(alpha * x)


def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return functional.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(alpha * x + beta, 0, 1)


def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.log_softmax(x, axis)


def dropout(x: Tensor, ratio: Tensor | None = None, training_mode: Tensor | None = None, *, seed: int = 0) -> Tensor:
    """As at inference: learning from a teacher needs no noise."""
    return x


def reduction(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A Reduce operator: `axes` is an input in newer opsets and an attribute in older ones."""

    def reduce_(x: Tensor, axes: Axes = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        dims = ints(axes) if axes is not None else []
        if not dims and noop_with_empty_axes:
            return x
        return function(x, dims or list(range(x.dim())), bool(keepdims))

    return reduce_


def product(x: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    for dim in sorted((d % x.dim() for d in dims), reverse=True):
        x = torch.prod(x, dim, keepdim)
    return x


def argmax(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    if select_last_index:
        return x.shape[axis] - 1 - torch.argmax(x.flip(axis), axis, bool(keepdims))
    return torch.argmax(x, axis, bool(keepdims))


def cumsum(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    dim = int(axis)
    y = torch.cumsum(x.flip(dim) if reverse else x, dim).to(x.dtype)
    y = y.flip(dim) if reverse else y
    return y - x if exclusive else y


def gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, *,
    alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0,
) -> Tensor:  # fmt: skip
    y = alpha * ((a.t() if transA else a) @ (b.t() if transB else b))
    return y if c is None else y + beta * c


def einsum(*inputs: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation, *inputs)


def conv(
    x: Tensor, w: Tensor, b: Tensor | None = None, *, auto_pad: str = "NOTSET", dilations: Sequence[int] | None = None,
    group: int = 1, kernel_shape: Sequence[int] | None = None, pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    n = x.dim() - 2
    if auto_pad not in ("NOTSET", "VALID"):
        raise NotImplementedError(f"auto_pad={auto_pad}")
    pads = list(pads or [0] * 2 * n)
    begin, end = pads[:n], pads[n:]
    if begin != end:
        x, begin = (
            functional.pad(x, [p for pair in zip(reversed(begin), reversed(end), strict=True) for p in pair]),
            [0] * n,
        )
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[n - 1]
    return function(x, w, b, list(strides or [1] * n), begin, list(dilations or [1] * n), group)


def layer_norm(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, *,
    axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1,
) -> Tensor:  # fmt: skip
    return functional.layer_norm(x, x.shape[axis:], scale, bias, epsilon)


def rms_norm(x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    return functional.rms_norm(x, x.shape[axis:], scale, epsilon)


def skip_norm(norm: Callable[..., Tensor], has_beta: bool) -> Callable[..., tuple[Any, ...]]:
    """ONNX Runtime's SkipLayerNormalization and its simplified kin: norm(x + skip), and the sum itself."""

    def skip_norm_(x: Tensor, skip: Tensor, *rest: Tensor | None, epsilon: float = 1e-12) -> tuple[Any, ...]:
        weights, (bias,) = (rest[:-1], rest[-1:]) if len(rest) > 1 + has_beta else (rest, (None,))
        total = x + skip if bias is None else x + skip + bias
        return norm(total, *weights, epsilon=epsilon), None, None, total

    return skip_norm_


_PLAIN: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs, "Add": torch.add, "And": torch.logical_and, "ArgMax": argmax, "Cast": cast, "CastLike": cast_like,
    "Ceil": torch.ceil, "Clip": clip, "Conv": conv, "Cos": torch.cos, "CumSum": cumsum, "Div": div, "Dropout": dropout,
    "Einsum": einsum, "Equal": torch.eq, "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "Gelu": gelu,
    "Gemm": gemm, "Greater": torch.gt, "GreaterOrEqual": torch.ge, "HardSigmoid": hard_sigmoid,
    "HardSwish": functional.hardswish, "Identity": lambda x: x, "IsInf": torch.isinf, "IsNaN": torch.isnan,
    "LayerNormalization": layer_norm, "Less": torch.lt, "LessOrEqual": torch.le, "Log": torch.log,
    "LogSoftmax": log_softmax, "MatMul": torch.matmul, "Max": variadic(torch.maximum), "Min": variadic(torch.minimum),
    "Mod": mod, "Mul": torch.mul, "Neg": torch.neg, "Not": torch.logical_not, "Or": torch.logical_or, "Pow": power,
    "RMSNormalization": rms_norm, "Reciprocal": torch.reciprocal,
    "ReduceL2": reduction(lambda x, dims, keep: torch.linalg.vector_norm(x, 2, dims, keep)),
    "ReduceMax": reduction(torch.amax), "ReduceMean": reduction(torch.mean), "ReduceMin": reduction(torch.amin),
    "ReduceProd": reduction(product),
    "ReduceSum": reduction(lambda x, dims, keep: torch.sum(x, dims, keep, dtype=x.dtype)),
    "ReduceSumSquare": reduction(lambda x, dims, keep: torch.sum(x * x, dims, keep)), "Relu": torch.relu,
    "Round": torch.round, "Sigmoid": torch.sigmoid, "Sign": torch.sign, "SimplifiedLayerNormalization": rms_norm,
    "Sin": torch.sin, "Softmax": softmax, "Softplus": functional.softplus, "Sqrt": torch.sqrt, "Sub": torch.sub,
    "Sum": variadic(torch.add), "Swish": swish, "Tan": torch.tan, "Tanh": torch.tanh, "Where": torch.where,
    "Xor": torch.logical_xor,
}  # fmt: skip

_MICROSOFT: dict[str, Callable[..., Any]] = {
    "BiasGelu": lambda x, bias: functional.gelu(x + bias),
    "FastGelu": lambda x, bias=None: functional.gelu(x if bias is None else x + bias, approximate="tanh"),
    "Gelu": functional.gelu,
    "QuickGelu": quick_gelu,
    "SimplifiedLayerNormalization": rms_norm,
    "SkipLayerNormalization": skip_norm(layer_norm, has_beta=True),
    "SkipSimplifiedLayerNormalization": skip_norm(rms_norm, has_beta=False),
}

OPS = {("", name): op for name, op in _PLAIN.items()} | {("com.microsoft", name): op for name, op in _MICROSOFT.items()}
