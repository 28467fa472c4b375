"""Numbers of a compiled model beside those of its dense self, on the same inputs, compared through Polygraphy."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER
from pydantic import BaseModel, ConfigDict

from trimtab.compiler.feeds import Run, random_feeds
from trimtab.passes.errors import TargetError, TrimtabError


class OutputError(BaseModel):
    """How far one output of the compiled model is from the dense one's, at one shape.

    Padded tokens are left out of [batch, tokens, ...] outputs, since nothing reads them.

    Attributes:
        output: its name.
        dims: sizes of the dynamic dimensions.
        padded: whether some rows ended in padding.
        max_abs, mean_abs: of |y - y_dense|.
        relative_l2: ‖y - y_dense‖ / ‖y_dense‖.
        cosine: between y and y_dense, flattened.
        fault: why there are no numbers: an output missing, of another shape, NaN or Inf.
    """

    model_config = ConfigDict(frozen=True)

    output: str
    dims: dict[str, int]
    padded: bool
    max_abs: float | None = None
    mean_abs: float | None = None
    relative_l2: float | None = None
    cosine: float | None = None
    fault: str | None = None

    def __bool__(self) -> bool:
        """What Polygraphy counts as a match."""
        return self.fault is None

    @property
    def severity(self) -> float:
        """By which the worst is found: the relative error; a fault is worse than any."""
        return float("inf") if self.relative_l2 is None else self.relative_l2

    @property
    def where(self) -> str:
        return describe(self.dims) + (", padded" if self.padded else "")


def describe(dims: Mapping[str, int]) -> str:
    """{"batch": 8, "tokens": 48} → "batch 8, tokens 48"."""
    return ", ".join(f"{name} {size}" for name, size in dims.items())


def compare(
    dense: Run,
    compiled: Run,
    graph: gs.Graph,
    dims: Mapping[str, int],
    rng: np.random.Generator,
    *,
    padded: bool,
    ids: np.ndarray | None = None,
) -> list[OutputError]:
    """Run both models once on the same random inputs.

    Args:
        graph: the dense graph, which says what inputs there are.
        dims: sizes of the dynamic dimensions.
        padded: end some rows in padding.
        ids: token ids of real text to draw from.

    Returns:
        One entry for each output of the dense model.

    Raises:
        TargetError: one of them does not run at this shape.
    """
    feeds = random_feeds(graph, dims, rng, padded=padded, ids=ids)
    runners = [_Runner(name, run, graph, describe(dims)) for name, run in (("dense", dense), ("compiled", compiled))]
    compare_func = partial(measure, dims=dict(dims), padded=padded, mask=feeds.get("attention_mask"))
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(invalid="ignore"):  # its statistics subtract Inf
        results = Comparator.run(runners, data_loader=[feeds])
        (accuracy,) = Comparator.compare_accuracy(results, compare_func=compare_func)
    return list(accuracy[("dense", "compiled")][0].values())


class _Runner(BaseRunner):
    """A Run as Polygraphy wants it."""

    def __init__(self, name: str, run: Run, graph: gs.Graph, where: str) -> None:
        super().__init__(name)
        self._run, self._where = run, where
        self._inputs = {tensor.name: tensor for tensor in graph.inputs}

    def get_input_metadata_impl(self) -> TensorMetadata:
        found = TensorMetadata()
        for name, tensor in self._inputs.items():
            shape = [size if isinstance(size, int) and size >= 0 else None for size in tensor.shape]
            found.add(name, np.dtype(tensor.dtype), shape)
        return found

    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        self.inference_time = 0.0  # times are measured elsewhere
        try:
            return self._run(feed_dict)
        except TrimtabError as error:
            raise TargetError(
                f"the {self.name} model fails at {self._where}: {error.message}",
                hint=error.hint or "keep the recipe's workload to sizes that the model takes",
            ) from error


def measure(
    dense: Mapping[str, np.ndarray],
    compiled: Mapping[str, np.ndarray],
    *,
    dims: dict[str, int],
    padded: bool,
    mask: np.ndarray | None,
) -> dict[str, OutputError]:
    """Every output of `compiled` beside that of `dense`. Serves Polygraphy, whose results are such mappings too."""
    found = dict(compiled.items())
    where = {"dims": dims, "padded": padded}
    return {
        name: OutputError(output=name, **where, **_errors(expected, found.get(name), mask))
        for name, expected in dense.items()
    }


def _errors(expected: np.ndarray, found: np.ndarray | None, mask: np.ndarray | None) -> dict[str, Any]:
    if found is None:
        return {"fault": "the compiled model does not have this output"}
    if found.shape != expected.shape:
        return {"fault": f"shape {list(found.shape)}, where the dense model gives {list(expected.shape)}"}
    for array, who in ((expected, "the dense model gives"), (found, "the compiled model gives")):
        if np.isnan(array).any():
            return {"fault": f"{who} NaN"}
        if np.isinf(array).any():
            return {"fault": f"{who} Inf"}
    a, b = real_values(expected, mask), real_values(found, mask)
    difference = np.abs(b - a)
    return {
        "max_abs": float(difference.max(initial=0)),
        "mean_abs": float(difference.mean()) if difference.size else 0.0,
        "relative_l2": relative_l2(a, b),
        "cosine": _cosine(a, b),
    }


def real_values(output: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """`output` flattened, in double precision; of [batch, tokens, ...] only the tokens that are no padding."""
    if mask is not None and output.ndim > 2 and output.shape[:2] == mask.shape:
        output = output[mask != 0]
    return output.reshape(-1).astype(np.float64)


def relative_l2(expected: np.ndarray, found: np.ndarray) -> float:
    """‖found - expected‖ / ‖expected‖."""
    return float(np.linalg.norm(found - expected)) / max(float(np.linalg.norm(expected)), 1e-12)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    product = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b / product) if product > 0 else float(np.array_equal(a, b))
