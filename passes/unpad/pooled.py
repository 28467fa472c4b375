"""Recognises tensors that pool the tokens of the last layer, by running the nodes behind it on random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.graph import topological
from trimtab.passes.graph.cut import reads
from trimtab.passes.graph.part import run_part
from trimtab.passes.unpad.inputs import feed, shape_of

__all__ = ["Pooled", "find_pooled"]

_CLOSE = 1e-4
_SEED = 0
_MAX_CANDIDATES = 16  # tensors that are tried


@dataclass(frozen=True)
class Pooled:
    """A tensor [batch, d] that pools `tokens`, [batch, tokens, d].

    Attributes:
        kind: "mean" of each sample's real tokens, or the "first" of them; 0 for a sample without any.
    """

    tensor: gs.Tensor
    tokens: gs.Tensor
    kind: Literal["mean", "first"]


def find_pooled(
    graph: gs.Graph, tensors: Sequence[gs.Tensor], mask: gs.Tensor | None, inside: set[int]
) -> list[Pooled]:
    """The tensors that pool one of `tensors`, [batch, tokens, d] each.

    Args:
        mask: the graph's input that marks real tokens, [batch, tokens]; None if all tokens are real.
        inside: ids of the nodes that compute each token by itself.
    """
    return [pooled for tensor in tensors for pooled in _pooled_of(graph, tensor, mask, inside)]


def _pooled_of(graph: gs.Graph, tokens: gs.Tensor, mask: gs.Tensor | None, inside: set[int]) -> Iterator[Pooled]:
    sized = tokens.shape is not None and len(tokens.shape) == 3 and isinstance(tokens.shape[-1], int)
    candidates = (
        list(_candidates(graph, tokens, inside))[:_MAX_CANDIDATES] if sized and tokens.dtype == np.float32 else []
    )
    if not candidates:
        return
    rng = np.random.default_rng(_SEED)
    batch, length = shape_of(tokens)
    x = rng.standard_normal((batch, length, int(tokens.shape[-1]))).astype(np.float32)
    real = np.ones((batch, length), bool)
    if mask is not None:
        real = rng.random((batch, length)) < 0.6
        real[:, length // 2] = True
    feeds = {tensor.name: feed(tensor, batch, length, rng) for tensor in graph.inputs} | {tokens.name: x}
    if mask is not None:
        feeds[mask.name] = real.astype(mask.dtype)
    mean = np.stack([rows[is_real].mean(0) for rows, is_real in zip(x.astype(np.float64), real, strict=True)])
    first = x[np.arange(batch), real.argmax(1)]
    for tensor, value in zip(candidates, run_part(graph, [tokens], candidates, feeds), strict=True):
        if value.shape != mean.shape:
            continue
        if np.allclose(value, mean, rtol=_CLOSE, atol=_CLOSE):
            yield Pooled(tensor, tokens, "mean")
        elif length > 1 and np.allclose(value, first, rtol=_CLOSE, atol=_CLOSE):
            yield Pooled(tensor, tokens, "first")


def _candidates(graph: gs.Graph, tokens: gs.Tensor, inside: set[int]) -> Iterator[gs.Tensor]:
    """Tensors [batch, d] that depend on `tokens` through other nodes than those `inside`."""
    reached = {id(tokens)}
    for node in topological(graph):
        if (
            id(node) in inside
            or node.op in ("Shape", "Size")
            or not any(id(tensor) in reached for tensor in reads(node))
        ):
            continue
        for tensor in node.outputs:
            reached.add(id(tensor))
            shape = tensor.shape
            if shape is not None and len(shape) == 2 and shape[-1] == tokens.shape[-1] and tensor.dtype == np.float32:
                yield tensor
