"""Checks that a batch does not change its samples. Some engines compute only row 0 right, without an error."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs
from pydantic import BaseModel, ConfigDict

from trimtab.compiler.checks.measure import TEXTS, real_values, relative_l2
from trimtab.compiler.feeds import Run, random_feeds
from trimtab.compiler.workload import Workload
from trimtab.passes.graph.shapes import token_outputs

_SAMPLES = 8  # samples of a batch that also run alone
_ROUNDING = 1e-3  # relative difference that another summation order may make, in float16 too
_FACTOR = 3  # how much more than its own error a lossy model may differ between alone and in a batch


class Consistency(BaseModel):
    """Whether samples give the same outputs alone and inside a batch.

    Attributes:
        difference: ‖y_batch - y_alone‖ / ‖y_alone‖ over some samples of the batch.
        allowed: largest difference that is no fault. A lossy model may round differently in a batch, so `allowed` is a
            multiple of the model's error on single samples.
    """

    model_config = ConfigDict(frozen=True)

    output: str
    dims: dict[str, int]
    difference: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.allowed


def batch_consistency(
    dense: Run,
    compiled: Run,
    graph: gs.Graph,
    workload: Workload,
    dims: Mapping[str, int],
    rng: np.random.Generator,
    ids: np.ndarray | None = None,
) -> list[Consistency]:
    """Run a padded batch, and some of its samples alone, through the compiled model.

    Args:
        dims: sizes of the dynamic dimensions; more than one sample.
        ids: token ids of real text to draw from.

    Returns:
        One entry for each output of the dense model that has a row of numbers per sample.
    """
    feeds = random_feeds(graph, dims, rng, padded=True, ids=ids)
    axes = workload.axes(graph)
    rows = np.unique(np.linspace(0, dims["batch"] - 1, _SAMPLES).astype(int))
    together = compiled(feeds)
    names = [tensor.name for tensor in graph.outputs if _has_rows(together[tensor.name], dims["batch"])]
    by_token = set(token_outputs(graph))
    parts: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in names}
    for row in rows:
        single = {name: _only(value, axes[name], row, workload.batch[0]) for name, value in feeds.items()}
        mask = single["attention_mask"][:1] if "attention_mask" in single else None
        reference, alone = dense(single), compiled(single)
        # Where sizes depend on values, as NonZero's do, rows of a batch are not rows of a sample alone.
        names = [name for name in names if reference[name][:1].shape == together[name][:1].shape]
        for name in names:
            three = (reference[name][:1], alone[name][:1], together[name][row : row + 1])
            parts[name].append(tuple(real_values(value, mask if name in by_token else None) for value in three))
    results = []
    for name in names:
        expected, by_itself, batched = (np.concatenate(arrays) for arrays in zip(*parts[name], strict=True))
        allowed = _ROUNDING + _FACTOR * relative_l2(expected, by_itself)
        difference = relative_l2(by_itself, batched)
        results.append(Consistency(output=name, dims=dict(dims), difference=difference, allowed=allowed))
    return results


def _has_rows(value: np.ndarray, batch: int) -> bool:
    return bool(value.ndim) and value.shape[0] == batch and value.dtype.kind not in TEXTS


def _only(value: np.ndarray, axes: tuple[int | str, ...], row: int, count: int) -> np.ndarray:
    """Sample `row` of an input, repeated `count` times: the smallest batch that the engine takes."""
    if "batch" not in axes:
        return value
    return np.repeat(value.take([row], axes.index("batch")), count, axes.index("batch"))
