"""Shapes, indexing and constants. `Shape` answers on the CPU: what is computed from it is sizes, not data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trimtab.training.ops.dtypes import ints

Ints = Tensor | Sequence[int]


def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


def size(x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64)


def reshape(x: Tensor, shape: Ints, *, allowzero: int = 0) -> Tensor:
    dims = ints(shape)
    if not allowzero:
        dims = [x.shape[i] if d == 0 else d for i, d in enumerate(dims)]
    return x.reshape(dims)


def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    rows = 1
    for d in x.shape[:axis]:
        rows *= d
    return x.reshape(rows, x.numel() // rows)


def transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    return x.permute(list(perm) if perm is not None else list(range(x.dim()))[::-1])


def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(ints(axes)))


def unsqueeze(x: Tensor, axes: Ints) -> Tensor:
    dims = ints(axes)
    rank = x.dim() + len(dims)
    for dim in sorted(d % rank for d in dims):
        x = x.unsqueeze(dim)
    return x


def expand(x: Tensor, shape: Ints) -> Tensor:
    return x.expand(torch.broadcast_shapes(tuple(x.shape), tuple(ints(shape))))


def tile(x: Tensor, repeats: Ints) -> Tensor:
    return x.repeat(ints(repeats))


def concat(*inputs: Tensor, axis: int) -> Tensor:
    return torch.cat(inputs, axis)


def split(x: Tensor, split: Ints | None = None, *, axis: int = 0, num_outputs: int | None = None) -> tuple[Tensor, ...]:
    if split is not None:
        return torch.split(x, ints(split), axis)
    if num_outputs is None:
        raise NotImplementedError("Split without sizes or num_outputs")
    return torch.split(x, -(-x.shape[axis] // num_outputs), axis)


def slice_(x: Tensor, starts: Ints, ends: Ints, axes: Ints | None = None, steps: Ints | None = None) -> Tensor:
    starts, ends = ints(starts), ints(ends)
    dims = ints(axes) if axes is not None else list(range(len(starts)))
    strides = ints(steps) if steps is not None else [1] * len(starts)
    for start, end, dim, step in zip(starts, ends, dims, strides, strict=True):
        taken = range(*slice(start, end, step).indices(x.shape[dim]))
        if step > 0:
            index: list[slice] = [slice(None)] * x.dim()
            index[dim] = slice(taken.start, max(taken.stop, taken.start), step)
            x = x[tuple(index)]
        else:
            x = x.index_select(dim, torch.tensor(list(taken), dtype=torch.int64, device=x.device))
    return x


def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    axis %= x.dim()
    if indices.dim() == 0:
        return x.select(axis, int(indices))
    indices = indices.long()
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    if axis == 0 and x.dim() == 2:
        return functional.embedding(indices, x)
    taken = x.index_select(axis, indices.reshape(-1))
    return taken.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    indices = indices.long()
    return torch.gather(x, axis, torch.where(indices < 0, indices + x.shape[axis], indices))


def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    last = tuple(indices.long().unbind(-1))
    around = tuple(
        torch.arange(n, device=x.device).reshape([-1 if j == i else 1 for j in range(last[0].dim())])
        for i, n in enumerate(x.shape[:batch_dims])
    )
    return x[around + last]


def scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    if reduction != "none":
        raise NotImplementedError(f"reduction={reduction}")
    indices = indices.long()
    return x.scatter(axis, torch.where(indices < 0, indices + x.shape[axis], indices), updates)


def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    if reduction not in ("none", "add"):
        raise NotImplementedError(f"reduction={reduction}")
    return x.index_put(tuple(indices.long().unbind(-1)), updates, accumulate=reduction == "add")


def range_(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def trilu(x: Tensor, k: Tensor | None = None, *, upper: int = 1) -> Tensor:
    diagonal = 0 if k is None else int(k)
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


def constant_of_shape(shape: Ints, *, value: Tensor | None = None) -> Tensor:
    filled = torch.zeros(1) if value is None else value
    return filled.reshape(()).expand(ints(shape)).clone()


def constant(
    *, value: Tensor | None = None, value_int: int | None = None, value_float: float | None = None,
    value_ints: Sequence[int] | None = None, value_floats: Sequence[float] | None = None,
) -> Tensor:  # fmt: skip
    if value is not None:
        return value
    whole = value_ints if value_int is None else value_int
    if whole is not None:
        return torch.tensor(whole, dtype=torch.int64)
    return torch.tensor(value_floats if value_float is None else value_float, dtype=torch.float32)


def pad(
    x: Tensor, pads: Ints, value: Tensor | None = None, axes: Ints | None = None, *, mode: str = "constant"
) -> Tensor:
    if mode != "constant":
        raise NotImplementedError(f"mode={mode}")
    amounts = ints(pads)
    dims = [d % x.dim() for d in ints(axes)] if axes is not None else list(range(x.dim()))
    widths = [0] * (2 * x.dim())  # torch counts from the last dimension
    for i, dim in enumerate(dims):
        place = 2 * (x.dim() - 1 - dim)
        widths[place : place + 2] = [amounts[i], amounts[len(dims) + i]]
    return functional.pad(x, widths, value=0.0 if value is None else value.item())


def topk(x: Tensor, k: Tensor, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    values, indices = torch.topk(x, int(k), axis, bool(largest), bool(sorted))
    return values, indices


_PLAIN: dict[str, Callable[..., Any]] = {
    "Concat": concat, "Constant": constant, "ConstantOfShape": constant_of_shape, "Expand": expand, "Flatten": flatten,
    "Gather": gather, "GatherElements": gather_elements, "GatherND": gather_nd, "Pad": pad, "Range": range_,
    "Reshape": reshape, "ScatterElements": scatter_elements, "ScatterND": scatter_nd, "Shape": shape, "Size": size,
    "Slice": slice_, "Split": split, "Squeeze": squeeze, "Tile": tile, "TopK": topk, "Transpose": transpose,
    "Trilu": trilu, "Unsqueeze": unsqueeze,
}  # fmt: skip

OPS = {("", name): op for name, op in _PLAIN.items()}
