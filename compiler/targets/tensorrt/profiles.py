"""Optimization profiles: the sizes for which an engine is built, from the workload."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from trimtab.compiler.decoder_cache import pasts
from trimtab.compiler.workload import Shape, Workload

PROMPT, STEP, ALL = "prompt", "step", "all"


@dataclass(frozen=True)
class Profile:
    """One optimization profile.

    Attributes:
        name: "all" for a model without a cache; a decoder has "prompt", for all sizes of the workload, and "step", for
            single tokens behind a cache.
        shapes: input → (min, opt, max).
    """

    name: str
    shapes: dict[str, tuple[Shape, Shape, Shape]]


def profiles_of(graph: gs.Graph, workload: Workload) -> list[Profile]:
    """The optimization profiles for `graph`, the general one first.

    Raises:
        RecipeError: a dynamic axis has no range in the workload.
    """
    if not pasts(tensor.name for tensor in graph.inputs):
        return [Profile(ALL, workload.shapes(graph))]
    profiles = [Profile(PROMPT, workload.shapes(graph))]
    low, opt, high = workload.past
    if high:
        low = max(1, low)
        step = workload.model_copy(update={"tokens": (1, 1, 1), "past": (low, max(low, opt), high)})
        profiles.append(Profile(STEP, step.shapes(graph)))
    return profiles


def tokens_of(graph: gs.Graph, workload: Workload) -> tuple[int, int] | None:
    """Minimum and maximum number of tokens of a call, all rows together; None where no input has a tokens axis."""
    axes = workload.axes(graph).values()
    if not any("tokens" in shape for shape in axes):
        return None
    fewest = 1 if any("past" in shape for shape in axes) else workload.tokens[0]
    return workload.batch[0] * fewest, workload.batch[2] * workload.tokens[2]
