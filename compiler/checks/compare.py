"""Compares the outputs of a compiled model and its dense model on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

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
    outputs = [
        _answer(run, feeds, f"the {name} model fails at {describe(dims)}")
        for name, run in (("dense", dense), ("compiled", compiled))
    ]
    mask, by_token = feeds.get("attention_mask"), token_outputs(graph)
    with np.errstate(invalid="ignore"):
        return list(measure(*outputs, dims=dict(dims), padded=padded, mask=mask, by_token=by_token).values())


def _answer(run: Run, feeds: dict[str, np.ndarray], failure: str) -> Mapping[str, np.ndarray]:
    try:
        return run(feeds)
    except TrimtabError as error:
        raise TargetError(
            f"{failure}: {error.message}",
            hint=error.hint or "keep the recipe's workload to sizes that the model takes",
        ) from error
