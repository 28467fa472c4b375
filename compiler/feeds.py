"""Makes inputs that a model accepts.

`random_feeds` makes random inputs, with ids inside their tables. `within` pads real inputs to the minimum size of an
engine. `converted` and `converting` give the inputs of one model the types of another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.compiler.builds.manifest import TensorInfo
from trimtab.compiler.fixed_shapes import in_whole_batches
from trimtab.compiler.workload import Workload
from trimtab.passes.errors import RecipeError, quoted
from trimtab.passes.graph.ranges import safe_values
from trimtab.passes.graph.shapes import token_outputs

Run = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
"""One call of a model: inputs → outputs, both by name."""

MAX_BYTES = 4 << 30
"""The maximum size of all random inputs of one call together, in bytes."""

_UNKNOWN = (0, 1)  # values of integers whose table is unknown: any table has these rows


def random_feeds(
    graph: gs.Graph,
    dims: Mapping[str, int],
    rng: np.random.Generator,
    *,
    padded: bool = False,
    ids: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """A random array for every input of `graph`.

    Args:
        graph: the dense graph.
        dims: sizes of the dimensions as `Workload` names them, such as {"batch": 8, "tokens": 48}.
        rng: source of randomness.
        padded: end some rows of `attention_mask` early, as a tokenizer does with texts of unequal length. If there are
            several rows, row 0 stays full, since a batch is as long as its longest text. With a past, the padding is
            in the past: a decoder has padded its prompts, and every new token is real.
        ids: token ids of real text, concatenated; each row of `input_ids` is then a run of them from a random place.
            Without `ids`, uniform random ids are used. They are unlike text, so a model compressed for text has
            larger errors on them.

    Returns:
        input name → array of the input's type and shape. Integers, and floats that are cast to indices, are inside the
        smallest table that they index, and 0 or 1 where the table is unknown. `attention_mask` is 1 (0 where padded);
        `position_ids` counts along the last axis, from the past on; `token_type_ids` is 0; texts are
        numbers; other floats are standard normal.

    Raises:
        RecipeError: `dims` lacks a dimension of the model, or the inputs would take more than `MAX_BYTES`.
    """
    shapes, feeds, past = _shapes(graph, dims), {}, dims.get("past", 0)
    _check_bytes(graph, shapes, dims)
    for tensor in graph.inputs:
        shape = shapes[tensor.name]
        dtype = np.dtype(tensor.dtype)
        if tensor.name == "attention_mask" and len(shape) == 2:
            feeds[tensor.name] = _mask(shape, rng, padded, past).astype(dtype)
        elif tensor.name == "position_ids":
            feeds[tensor.name] = np.broadcast_to(past + np.arange(shape[-1]), shape).astype(dtype)
        elif tensor.name == "token_type_ids":
            feeds[tensor.name] = np.zeros(shape, dtype)
        elif dtype.kind == "b" or "mask" in tensor.name:
            feeds[tensor.name] = np.ones(shape, dtype)
        elif tensor.name == "input_ids" and ids is not None:
            starts = rng.integers(0, len(ids), shape[:-1])
            feeds[tensor.name] = ids[(starts[..., None] + np.arange(shape[-1])) % len(ids)].astype(dtype)
        elif np.issubdtype(dtype, np.integer) or safe_values(tensor) is not None:
            low, high = safe_values(tensor) or _UNKNOWN
            feeds[tensor.name] = rng.integers(low, high + 1, shape).astype(dtype)
        elif dtype.kind == "O":
            feeds[tensor.name] = rng.integers(0, 100, shape).astype(str).astype(object)
        else:
            feeds[tensor.name] = rng.standard_normal(shape).astype(dtype)
    return feeds


def _shapes(graph: gs.Graph, dims: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    others = {name: size for name, size in dims.items() if name not in ("batch", "tokens", "past")}
    fixed = Workload.model_validate({**{k: v for k, v in dims.items() if k not in others}, "dims": others})
    return {name: opt for name, (_, opt, _) in fixed.shapes(graph).items()}


def _check_bytes(graph: gs.Graph, shapes: Mapping[str, tuple[int, ...]], dims: Mapping[str, int]) -> None:
    """Refuse sizes before memory is taken for them: a fixed dimension of a foreign file is any number."""
    needed = {tensor.name: math.prod(shapes[tensor.name]) * np.dtype(tensor.dtype).itemsize for tensor in graph.inputs}
    if sum(needed.values()) > MAX_BYTES:
        name = max(needed, key=lambda each: needed[each])
        sizes = ", ".join(f"{key} {size}" for key, size in dims.items())
        raise RecipeError(
            f"inputs of {sizes} take {sum(needed.values())} bytes, more than {MAX_BYTES}; "
            f"the largest is {quoted(name)} of shape {list(shapes[name])[:8]}",
            hint="give a smaller workload, or export the model with smaller fixed dimensions",
        )


def _mask(shape: tuple[int, ...], rng: np.random.Generator, padded: bool, past: int) -> np.ndarray:
    """Ones, [rows, columns]. If `padded`, each row (or its past) is 0 from a random place in its second half on."""
    rows, columns = shape
    filled = min(past, columns) or columns  # the part that may end in padding
    lengths = np.full(rows, filled)
    if padded:
        lengths = rng.integers((filled + 1) // 2, filled + 1, rows)
        lengths[-1] = (filled + 1) // 2  # so that at least one row is padded
        if rows > 1:
            lengths[0] = filled
    places = np.arange(columns)
    return (places < lengths[:, None]) | (places >= filled)


def converted(feeds: Mapping[str, np.ndarray], inputs: Iterable[TensorInfo | gs.Tensor]) -> dict[str, np.ndarray]:
    """`feeds` with floats converted to the types of `inputs`; a build may take other types than its dense model."""
    types = {tensor.name: np.dtype(tensor.dtype) for tensor in inputs}
    floats = {name for name, kind in types.items() if kind.kind == "f"}
    return {
        name: value.astype(types[name], copy=False) if name in floats and value.dtype.kind == "f" else value
        for name, value in feeds.items()
    }


def converting(run: Run, inputs: Sequence[TensorInfo]) -> Run:
    """Wrap `run` of a build with these `inputs`, so that it takes the feeds of the dense model."""
    return lambda feeds: run(converted(feeds, inputs))


def within(run: Run, graph: gs.Graph, workload: Workload) -> Run:
    """Wrap `run`, so that it gets only the inputs of `graph`, in at least the minimum sizes of `workload`.

    Engines refuse smaller inputs. Rows are repeated, and padding is added where `attention_mask` can mark it; the added
    rows and tokens of the outputs are cut off.
    """
    axes, by_token = workload.axes(graph), token_outputs(graph)
    run = in_whole_batches(run, graph.inputs)

    def fitted(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        fed = {name: value for name, value in feeds.items() if name in axes}
        sizes = {axis: size for name, value in fed.items() for axis, size in zip(axes[name], value.shape, strict=True)}
        rows, tokens = sizes.get("batch", workload.batch[0]), sizes.get("tokens", workload.tokens[0])
        padding = max(0, workload.tokens[0] - tokens) if "attention_mask" in fed else 0
        copies = np.arange(max(rows, workload.batch[0])) % max(rows, 1)
        outputs = run({name: _grown(value, axes[name], copies, padding) for name, value in fed.items()})
        if padding:
            outputs = {**outputs} | {name: outputs[name][:, :tokens] for name in by_token}
        return {name: value[:rows] if len(copies) > rows else value for name, value in outputs.items()}

    return fitted


def _grown(value: np.ndarray, axes: Sequence[int | str], rows: np.ndarray, padding: int) -> np.ndarray:
    """An input with the given `rows` of its batch, and `padding` more columns in each axis of tokens."""
    if "batch" in axes and value.shape[axes.index("batch")] != len(rows):
        value = value.take(rows, axes.index("batch"))
    if not padding:
        return value
    return np.pad(value, [(0, padding if axis in ("tokens", "total") else 0) for axis in axes])
