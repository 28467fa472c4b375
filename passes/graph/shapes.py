"""Derives sizes of tensors without running the graph."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.graph.weights import values

_READ = 64  # maximum number of elements of a constant that may be a shape
_DEPTH = 16  # maximum number of nodes between a shape and the tensors whose sizes it contains

Dim: TypeAlias = int | str | tuple[int, int]
"""A size: a number, a symbol, or axis `[1]` of the tensor with id `[0]`. Equal values are equal sizes."""


def dim(tensor: gs.Tensor, axis: int) -> Dim:
    """Size of `tensor` along `axis`."""
    size = tensor.shape[axis] if tensor.shape is not None else None
    return size if size not in (None, "", "?", -1) else (id(tensor), axis)


def entries(tensor: gs.Tensor, depth: int = _DEPTH) -> list[Dim] | None:
    """The elements of an integer tensor that contains a shape, or None if they cannot be derived."""
    if isinstance(tensor, gs.Constant):
        small = int(np.prod(tensor.shape, dtype=np.int64)) <= _READ
        return [int(v) for v in values(tensor).reshape(-1)] if small else None
    if len(tensor.inputs) != 1 or not depth:
        return None
    node = tensor.inputs[0]
    if not node.inputs:
        return None
    source = node.inputs[0]
    if node.op == "Shape" and source.shape is not None:
        axes = range(len(source.shape))[int(node.attrs.get("start", 0)) : node.attrs.get("end")]
        return [dim(source, axis) for axis in axes]
    if node.op == "Concat":
        parts = [entries(t, depth - 1) for t in node.inputs]
        return None if any(part is None for part in parts) else [e for part in parts if part is not None for e in part]
    if node.op in ("Unsqueeze", "Squeeze", "Cast", "Identity"):
        return entries(source, depth - 1)
    if node.op in ("Gather", "Slice"):
        return _picked(node, entries(source, depth - 1))
    return None


def _picked(node: gs.Node, whole: list[Dim] | None) -> list[Dim] | None:
    """The elements of `whole` that a Gather or Slice with constant positions selects."""
    if whole is None or not all(isinstance(t, gs.Constant) for t in node.inputs[1:]):
        return None
    positions = [values(t).reshape(-1) for t in node.inputs[1:]]
    if node.op == "Gather":
        return [whole[int(i)] for i in positions[0] if -len(whole) <= i < len(whole)]
    step = int(positions[3][0]) if len(positions) > 3 else 1
    return whole[int(positions[0][0]) : int(positions[1][0]) : step]


def token_outputs(graph: gs.Graph) -> list[str]:
    """Names of the outputs of `graph` that have a row for each token: [batch, tokens], or [batch, tokens, ...].

    Where the inputs leave the number of tokens open, a fixed size (such as a decoder cache's heads) is not one.
    """
    places = [list(tensor.shape) for tensor in graph.inputs if tensor.shape is not None and len(tensor.shape) == 2]
    tokens = {shape[1] for shape in places}
    return [
        tensor.name
        for tensor in graph.outputs
        if tensor.shape is not None
        and (list(tensor.shape) in places or (len(tensor.shape) > 2 and _may_count(tensor.shape[1], tokens)))
    ]


def _may_count(size: int | str | None, tokens: Collection[int | str | None]) -> bool:
    """Whether `size` may be one of `tokens`, the numbers of tokens that the inputs declare."""
    return not isinstance(size, int) or not tokens or size in tokens
