"""Compares the outputs of a compiled model and its dense model on the same inputs, through Polygraphy."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from trimtab.compiler.checks.measure import OutputError, describe, measure
from trimtab.compiler.feeds import Run, random_feeds
from trimtab.passes.errors import TargetError, TrimtabError
from trimtab.passes.graph.shapes import token_outputs


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
        graph: the dense graph, which declares the inputs.
        dims: sizes of the dynamic dimensions.
        padded: end some rows in padding.
        ids: token ids of real text to draw from.

    Returns:
        One entry for each output of the dense model.

    Raises:
        TargetError: one of the models does not run at this shape.
    """
    feeds = random_feeds(graph, dims, rng, padded=padded, ids=ids)
    runners = [_Runner(name, run, graph, describe(dims)) for name, run in (("dense", dense), ("compiled", compiled))]
    mask, by_token = feeds.get("attention_mask"), token_outputs(graph)
    compare_func = partial(measure, dims=dict(dims), padded=padded, mask=mask, by_token=by_token)
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(invalid="ignore"):  # Polygraphy's statistics subtract Inf
        results = Comparator.run(runners, data_loader=[feeds])
        (accuracy,) = Comparator.compare_accuracy(results, compare_func=compare_func)
    return list(accuracy[("dense", "compiled")][0].values())


class _Runner(BaseRunner):
    """Wraps a Run as a runner of Polygraphy."""

    def __init__(self, name: str, run: Run, graph: gs.Graph, where: str) -> None:
        super().__init__(name)
        self._run, self._where = run, where
        self._inputs = {tensor.name: tensor for tensor in graph.inputs}

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for name, tensor in self._inputs.items():
            shape = [size if isinstance(size, int) and size >= 0 else None for size in tensor.shape]
            metadata.add(name, np.dtype(tensor.dtype), shape)
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        self.inference_time = 0.0  # times are measured elsewhere
        try:
            return self._run(feed_dict)
        except TrimtabError as error:
            raise TargetError(
                f"the {self.name} model fails at {self._where}: {error.message}",
                hint=error.hint or "keep the recipe's workload to sizes that the model takes",
            ) from error
