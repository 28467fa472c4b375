"""Inputs that a model accepts: random ones, with ids inside their tables; and real ones brought to the least size."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.compiler.workload import Workload
from trimtab.passes.graph.ranges import safe_values

Run = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
"""One call of a model: inputs → outputs, both by name."""

_UNKNOWN = (0, 1)  # of integers whose tables were not found: any table has such rows


def random_feeds(
    graph: gs.Graph,
    dims: Mapping[str, int],
    rng: np.random.Generator,
    *,
    padded: bool = False,
    ids: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """One random value for every input of `graph`.

    Args:
        graph: the dense graph.
        dims: sizes of the dimensions as `Workload` names them, such as {"batch": 8, "tokens": 48}.
        rng: where the randomness comes from.
        padded: end some rows of `attention_mask` early, as a tokenizer does with texts of unequal length. Row 0 of
            several stays full, since a batch is as long as its longest text.
        ids: token ids of real text, one after the other; rows of `input_ids` are then runs of them from random places.
            Without, ids are drawn evenly, which is far from any text: a model compressed for text errs more on them.

    Returns:
        input name → array of the input's type and shape. Integers lie inside the smallest table they look up, and
        are 0 or 1 where none was found; floats that are cast to indices lie there, too. `attention_mask` is 1 (0 where
        padded); `position_ids` counts along the last axis; `token_type_ids` is 0; other floats are standard normal.

    Raises:
        RecipeError: `dims` lacks a dimension of the model.
    """
    shapes, feeds = _shapes(graph, dims), {}
    for tensor in graph.inputs:
        shape = shapes[tensor.name]
        dtype = np.dtype(tensor.dtype)
        if tensor.name == "attention_mask" and len(shape) == 2:
            feeds[tensor.name] = _mask(shape, rng, padded).astype(dtype)
        elif tensor.name == "position_ids":
            feeds[tensor.name] = np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
        elif tensor.name == "token_type_ids":
            feeds[tensor.name] = np.zeros(shape, dtype)
        elif dtype.kind == "b" or "mask" in tensor.name:
            feeds[tensor.name] = np.ones(shape, dtype)
        elif tensor.name == "input_ids" and ids is not None:
            starts = rng.integers(0, len(ids), shape[:-1])
            feeds[tensor.name] = ids[(starts[..., None] + np.arange(shape[-1])) % len(ids)].astype(dtype)
        elif np.issubdtype(dtype, np.integer) or safe_values(tensor) is not None:
            least, most = safe_values(tensor) or _UNKNOWN
            feeds[tensor.name] = rng.integers(least, most + 1, shape).astype(dtype)
        else:
            feeds[tensor.name] = rng.standard_normal(shape).astype(dtype)
    return feeds


def _shapes(graph: gs.Graph, dims: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    others = {name: size for name, size in dims.items() if name not in ("batch", "tokens", "past")}
    fixed = Workload.model_validate({**{k: v for k, v in dims.items() if k not in others}, "dims": others})
    return {name: opt for name, (_, opt, _) in fixed.shapes(graph).items()}


def _mask(shape: tuple[int, ...], rng: np.random.Generator, padded: bool) -> np.ndarray:
    """Ones, [rows, tokens]; where `padded`, zeros from a random place in the second half of a row on."""
    rows, tokens = shape
    lengths = np.full(rows, tokens)
    if padded:
        lengths = rng.integers((tokens + 1) // 2, tokens + 1, rows)
        lengths[-1] = (tokens + 1) // 2  # so that at least one row is padded
        if rows > 1:
            lengths[0] = tokens
    return np.arange(tokens) < lengths[:, None]


def within(run: Run, inputs: set[str], workload: Workload) -> Run:
    """`run`, given only the `inputs` it knows, and never less than the least of `workload`, which engines refuse.

    Rows are repeated, and columns added as padding where `attention_mask` can mark it; what comes out is cut again.
    """

    def fitted(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        fed = {name: value for name, value in feeds.items() if name in inputs}
        rows, tokens = len(next(iter(fed.values()))), None
        mask = fed.get("attention_mask")
        if mask is not None and mask.shape[1] < workload.tokens[0]:
            tokens = mask.shape[1]
            fed = {name: np.pad(value, ((0, 0), (0, workload.tokens[0] - tokens))) for name, value in fed.items()}
        if rows < workload.batch[0]:
            fed = {name: np.resize(value, (workload.batch[0], *value.shape[1:])) for name, value in fed.items()}
        return {name: _cut(value, rows, tokens, workload.tokens[0]) for name, value in run(fed).items()}

    return fitted


def _cut(value: np.ndarray, rows: int, tokens: int | None, padded: int) -> np.ndarray:
    if tokens is not None and value.ndim > 2 and value.shape[1] == padded:
        value = value[:, :tokens]
    return value[:rows]
