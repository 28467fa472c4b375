"""Sizes to check a build at: the corners of its workload, in calls that its model takes."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_graphsurgeon as gs

from trimtab.compiler.workload import Workload
from trimtab.passes.errors import RecipeError


def corners(graph: gs.Graph, workload: Workload) -> list[dict[str, int]]:
    """The distinct corners of `workload`, in the dimensions that the model has.

    Raises:
        RecipeError: a dynamic axis has no range in the workload, or the model takes none of its calls.
    """
    used = workload.dimensions(graph)
    distinct: dict[tuple[tuple[str, int], ...], dict[str, int]] = {}
    for corner in workload.corners():
        for sizes in calls_at(graph, workload, corner):
            dims = {name: size for name, size in sizes.items() if name in used}
            distinct.setdefault(tuple(dims.items()), dims)
    return list(distinct.values())


def calls_at(graph: gs.Graph, workload: Workload, sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """`sizes`, if the dense model takes a call of these sizes; else the nearest calls: a prompt, one row, one token.

    ONNX Runtime's GroupQueryAttention takes several tokens behind a past only in a batch of one row.

    Raises:
        RecipeError: the workload declares no call that the model takes.
    """
    batch, tokens, past = (sizes.get(name, least) for name, least in (("batch", 1), ("tokens", 1), ("past", 0)))
    if batch == 1 or tokens == 1 or past == 0 or not any(node.op == "GroupQueryAttention" for node in graph.nodes):
        return [dict(sizes)]
    least = {"past": 0, "batch": 1, "tokens": 1}
    nearest = [{**sizes, name: size} for name, size in least.items() if getattr(workload, name)[0] <= size]
    if not nearest:
        raise RecipeError(
            f"workload: {batch} rows of {tokens} tokens behind a past of {past}: the model's attention "
            "(GroupQueryAttention) takes several tokens behind a past for one row alone",
            hint="let workload.past begin at 0, workload.batch at 1, or workload.tokens at 1",
        )
    return nearest
