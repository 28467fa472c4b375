"""Random inputs for trials of parts of a graph, and the search for the mask input."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_graphsurgeon as gs

__all__ = ["feed", "mask_of", "shape_of"]

_BATCH, _TOKENS = 3, 7  # where a graph does not fix them


def shape_of(stream: gs.Tensor) -> tuple[int, int]:
    """Batch and tokens for a trial of a stream [batch, tokens, d]."""
    sizes = (list(stream.shape) if stream.shape is not None else [None, None])[:2]
    return tuple(s if isinstance(s, int) else d for s, d in zip(sizes, (_BATCH, _TOKENS), strict=True))  # type: ignore[return-value]


def feed(tensor: gs.Tensor, batch: int, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Random floats, or zeros for other types. An unknown first size is `batch`, other unknown sizes are `tokens`."""
    shape = [s if isinstance(s, int) else (tokens if axis else batch) for axis, s in enumerate(tensor.shape or [])]
    dtype = np.dtype(tensor.dtype or np.float32)
    if np.issubdtype(dtype, np.floating):
        return np.asarray(rng.standard_normal(shape)).astype(dtype)
    return np.zeros(shape, dtype)


def mask_of(graph: gs.Graph, tensors: Iterable[gs.Tensor], cut: Iterable[gs.Tensor]) -> list[gs.Tensor]:
    """The graph's inputs on whose values (not only sizes) `tensors` depend, if the tensors `cut` are known."""
    inputs = {id(tensor): tensor for tensor in graph.inputs}
    seen = {id(tensor) for tensor in cut}
    stack = [tensor for tensor in tensors if id(tensor) not in seen]
    reached: dict[int, gs.Tensor] = {}
    while stack:
        tensor = stack.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if id(tensor) in inputs:
            reached[id(tensor)] = tensor
        for node in tensor.inputs:
            if node.op not in ("Shape", "Size"):
                stack += node.inputs
    return list(reached.values())
