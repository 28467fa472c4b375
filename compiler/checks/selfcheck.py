"""The last step before a build is let out: the finished engine runs, beside the dense model, on random inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.compiler.builds.manifest import SelfCheck, TensorInfo
from trimtab.compiler.checks.corners import calls_at
from trimtab.compiler.checks.measure import measure
from trimtab.compiler.feeds import converted, random_feeds
from trimtab.compiler.recipe import Recipe
from trimtab.compiler.sources import Source
from trimtab.compiler.targets import Target, get_target
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner, session_options
from trimtab.compiler.workload import Workload
from trimtab.passes.dials import Dials
from trimtab.passes.errors import BuildError
from trimtab.passes.graph.shapes import token_outputs
from trimtab.plugins.driver import compute_capability

LIMIT = 1 << 30
"""Bytes of dense weights above which the check is skipped: to run the dense model takes all of them into memory."""

_SMALL = {"batch": 2, "tokens": 16}


def self_check(
    source: Source,
    dense_bytes: int,
    folder: Path,
    recipe: Recipe,
    inputs: Sequence[TensorInfo],
    dials: Dials = Dials(),  # noqa: B008  (frozen)
) -> SelfCheck:
    """Compare the engine in `folder` with the dense model at one small shape.

    Args:
        inputs: of the engine, whose floats may be of other types than the dense model's.
        dials: of the engine. The errors are those at their exact end; at their defaults and at full speed, the outputs
            have to be there, and finite.

    Returns:
        the errors of each output, or why the check was skipped.

    Raises:
        BuildError: an output is missing, of another shape, or not finite.
        TargetError: one of the two cannot be opened or run.
    """
    target = get_target(recipe.target)
    why = _skip(target, recipe, dense_bytes)
    if why:
        return SelfCheck(ran=False, why=why)

    graph = source.graph()
    dims = _dims(graph, recipe.workload)
    feeds = random_feeds(graph, dims, np.random.default_rng(0), padded=True)
    dense = _run_dense(source.onnx, recipe.threads, feeds)
    batch = len(next(iter(feeds.values())))
    turned = [dials.exact(batch)] + ([dials.feeds(batch), dials.feeds(batch, speed=1.0)] if dials.dials else [])
    with closing(target.open(folder, threads=recipe.threads, shards=recipe.shards)) as runner:
        answers = [runner.run(converted(feeds, inputs) | setting) for setting in turned]
    # Not through Polygraphy, which would bring in torch, with more memory and time than the check itself.
    compared = [
        measure(dense, each, dims=dims, padded=True, mask=feeds.get("attention_mask"), by_token=token_outputs(graph))
        for each in answers
    ]
    for error in (error for errors in compared for error in errors.values()):
        if error.fault:
            raise BuildError(
                f"check of the finished engine: output {error.output!r}: {error.fault}",
                hint="a pass may be too much for this model; `check: false` in the recipe leaves this check out",
            )
    return SelfCheck(ran=True, outputs=tuple(compared[0].values()))


def _skip(target: Target, recipe: Recipe, dense_bytes: int) -> str | None:
    if not recipe.check:
        return "the recipe says check: false"
    if dense_bytes > LIMIT:
        return f"running {dense_bytes / 1e9:.1f} GB of dense weights takes that much memory; `trimtab validate` does it"
    why = target.cannot_run_here()
    if why is None and not recipe.engine.meant_for(compute_capability()):
        return (
            f"the engine is for GPUs of compute capability {', '.join(recipe.engine.gpus)}, and this machine has none"
        )
    return why


def _dims(graph: gs.Graph, workload: Workload) -> dict[str, int]:
    """Size of each dimension of the model: the declared optimum, or less where that will do; the shortest past."""
    ranges = {"batch": workload.batch, "tokens": workload.tokens, **workload.dims}
    sizes = {name: max(low, min(opt, _SMALL.get(name, opt))) for name, (low, opt, _) in ranges.items()}
    used = workload.dimensions(graph)
    call = calls_at(graph, workload, sizes | {"past": workload.past[0]})[0]
    return {name: size for name, size in call.items() if name in used}


def _run_dense(dense: Path, threads: int | None, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run once, without the second copy of the weights that ONNX Runtime would pack for speed."""
    options = session_options(threads)
    options.add_session_config_entry("session.disable_prepacking", "1")
    return OnnxRuntimeRunner(dense, options).run(feeds)
