"""The last step of a compile: the finished engine and the dense model run on the same random inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.compiler.builds.manifest import SelfCheck, TensorInfo
from trimtab.compiler.checks.corners import calls_at
from trimtab.compiler.checks.measure import measure
from trimtab.compiler.checks.patience import within
from trimtab.compiler.feeds import converted, random_feeds
from trimtab.compiler.recipe import Recipe
from trimtab.compiler.sources import Source
from trimtab.compiler.targets import Runner, Target, get_target
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner, session_options
from trimtab.compiler.workload import Workload
from trimtab.passes.dials import Dials
from trimtab.passes.errors import BuildError, TargetError
from trimtab.passes.graph.shapes import token_outputs
from trimtab.plugins.driver import compute_capability

LIMIT = 1 << 30
"""Bytes of dense weights above which the check is skipped: a run of the dense model holds all of them in memory."""

_SMALL = {"batch": 2, "tokens": 16}

MAX_TOKENS = 1 << 17
"""Tokens of the smallest call above which the check is skipped: activations would take gigabytes of memory."""

MAX_SECONDS = 300.0
"""Time limit of each of the two models. Some graphs of others never end."""


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
        inputs: inputs of the engine, whose floats may be of other types than the dense model's.
        dials: dials of the engine. Errors are measured at their exact end; at their defaults and at full speed, the
            outputs only have to exist and be finite.

    Returns:
        The errors of each output, or why the check was skipped.

    Raises:
        BuildError: an output is missing, has another shape, or is not finite.
        TargetError: the engine or the dense model cannot be opened or run, or takes longer than a limit.
    """
    target = get_target(recipe.target)
    skip_reason = _skip(target, recipe, dense_bytes)
    if skip_reason:
        return SelfCheck(ran=False, why=skip_reason)

    graph = source.graph()
    dims = _dims(graph, recipe.workload)
    tokens = dims.get("batch", 1) * dims.get("tokens", 1)
    if tokens > MAX_TOKENS:
        return SelfCheck(ran=False, why=f"the smallest call has {tokens} tokens; `trimtab validate` runs it")
    feeds = random_feeds(graph, dims, np.random.default_rng(0), padded=True)
    dense = _run_dense(source, recipe.threads, feeds)
    batch = len(next(iter(feeds.values())))
    settings = [dials.exact(batch)] + ([dials.feeds(batch), dials.feeds(batch, speed=1.0)] if dials.dials else [])
    with closing(_open(target, folder, recipe)) as runner:
        answers = [_run(runner, converted(feeds, inputs) | setting, "the engine") for setting in settings]
    compared = [
        measure(dense, each, dims=dims, padded=True, mask=feeds.get("attention_mask"), by_token=token_outputs(graph))
        for each in answers
    ]
    for error in (error for errors in compared for error in errors.values()):
        if error.fault:
            cause = "a pass may not suit this model" if recipe.passes else "the model itself gives it on random inputs"
            raise BuildError(
                f"check of the finished engine: output {error.output!r}: {error.fault}",
                hint=f"{cause}; `check: false` in the recipe skips this check",
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
    """Size of each dimension of the model: the opt size or less, as the workload allows; the shortest past."""
    ranges = {"batch": workload.batch, "tokens": workload.tokens, **workload.dims}
    sizes = {name: max(low, min(opt, _SMALL.get(name, opt))) for name, (low, opt, _) in ranges.items()}
    used = workload.dimensions(graph)
    call = calls_at(graph, workload, sizes | {"past": workload.past[0]})[0]
    return {name: size for name, size in call.items() if name in used}


def _open(target: Target, folder: Path, recipe: Recipe) -> Runner:
    return target.open(folder, threads=recipe.threads, shards=recipe.shards)


def _run(runner: Runner, feeds: Mapping[str, np.ndarray], who: str) -> dict[str, np.ndarray]:
    try:
        return dict(within(MAX_SECONDS, partial(runner.run, feeds), runner.stop))
    except TimeoutError as error:
        raise TargetError(
            f"check of the finished engine: {who} ran longer than {MAX_SECONDS:g} s on a small call",
            hint="see that its loops end; `check: false` in the recipe skips this check",
        ) from error


def _run_dense(dense: Source, threads: int | None, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run once, without the packed second copy of the weights that ONNX Runtime makes for speed."""
    options = session_options(threads)
    options.add_session_config_entry("session.disable_prepacking", "1")
    return _run(OnnxRuntimeRunner(dense.onnx, options), feeds, "the dense model")
