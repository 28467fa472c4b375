"""`trimtab cost`: FLOPs, time and quality of a build at each speed, beside its dense model, on real data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trimtab.compiler.builds.build import Build, of_one_build
from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.builds.writer import record, store_path
from trimtab.compiler.checks.bench import default_threads
from trimtab.compiler.checks.cost import Counter, Passage
from trimtab.compiler.checks.cost_report import CostReport, Kept, SettingCost
from trimtab.compiler.checks.dense import dense_model, dense_source
from trimtab.compiler.checks.executed import Executed, Execution, Feeds
from trimtab.compiler.checks.frontier import grid, measured_path, walk
from trimtab.compiler.checks.peers import DENSE, open_peer
from trimtab.compiler.checks.peers.same_target import dense_engine
from trimtab.compiler.checks.speed import this_machine
from trimtab.compiler.checks.task import Samples, check_labels
from trimtab.compiler.checks.timing import REST_S, interleave
from trimtab.compiler.data import read_data
from trimtab.compiler.engine import load
from trimtab.compiler.feeds import Run, converting, within
from trimtab.compiler.progress import Progress
from trimtab.compiler.workload import Workload
from trimtab.passes.dials import Dials, SpeedPoint
from trimtab.passes.errors import InputError, TargetError
from trimtab.passes.graph import load_graph

SPEEDS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""The speeds at which a build with dials is measured by default."""

_ROUNDS = 6  # untimed and timed runs of each engine, at least: three rounds of both kinds


def cost(build: Build, *, data: Path, save_path: bool = False, **options: Any) -> tuple[CostReport, Build]:
    """Call `measure_cost`, and record the result beside the build.

    Args:
        save_path: walk the grid of the dials, and store the resulting path in the build.

    Returns:
        The report, and the build; its manifest changes where a path is stored.
    """
    report = measure_cost(build, data=data, walk_dials=save_path, **options)
    if save_path:
        build = store_path(build, report.path)
    record(build, cost=report.summary())
    return report, build


@of_one_build
def measure_cost(
    build: Build,
    *,
    data: Path,
    speeds: Sequence[float] = (),
    dials: Mapping[str, float] | None = None,
    batch: int | None = None,
    samples: int | None = None,
    threads: int | None = None,
    seconds: float = 10.0,
    dense: Path | None = None,
    seed: int = 0,
    walk_dials: bool = False,
    values: Mapping[str, Sequence[float]] | None = None,
    max_drop: float | None = None,
    progress: Progress | None = None,
) -> CostReport:
    """Measure the FLOPs, task quality and time of `build` on data, at some settings of its dials.

    Outputs, FLOPs, exits and tokens come from one run of a copy of the compiled graph in ONNX Runtime; times come from
    the engine itself, which takes turns with the dense model on the same target.

    Args:
        data: data to run on; quality is measured against their labels, or without labels against the dense model.
        speeds: speeds to measure; by default `SPEEDS` where the build has dials and `dials` are not given.
        dials: dial → value, beside or instead of `speeds`.
        batch: samples in a call; by default the workload's smallest batch.
        samples: maximum number of samples of the data; None for all.
        threads: threads of every engine; by default those of the recipe, else one per physical core.
        seconds: timing budget for all engines together; 0 skips timing.
        dense: the dense ONNX file; by default the one that the build was compiled from.
        seed: seed of the sampling.
        walk_dials: walk the dials on these data first, and measure along the resulting path of `speed`.
        values: dial → values that the walk tries; see `frontier.levels`.
        max_drop: points of quality that the fastest setting of the path may lose against the exact one.

    Raises:
        InputError: the build does not have these dials, or they do not take these values.
        TrimtabError: the build is damaged or was replaced meanwhile, its target or dense model is missing, it is
            divided into shards, it has a product that cannot be counted, or the data do not fit.
    """
    manifest = build.manifest
    all_dials, speeds = manifest.all_dials, list(speeds)
    if walk_dials and not all_dials.dials:
        raise InputError("the engine has no dials, so there is no path to measure",
                         hint="compile with a pass that has dials, such as token-prune or early-exit")  # fmt: skip
    walk_values = grid(all_dials.dials, values)
    if not speeds and not dials and all_dials.dials:
        speeds = list(SPEEDS)
    asked: list[float | None] = [*speeds] or [None]
    for speed in asked:
        all_dials.values(dials, speed)  # refuse an impossible setting before minutes of work
    if manifest.shards > 1:
        raise TargetError(
            f"{build.path}: the FLOPs of {manifest.shards} shards are not counted", hint="compile it with `shards: 1`"
        )
    dataset = read_data(data)
    model = dense or dense_model(build)
    graph, workload, source = load_graph(model), Workload.model_validate(manifest.workload), dense_source(build, model)
    warnings = check_labels(dataset, manifest.task, source, graph, needed=False)
    chosen = Samples(
        graph, workload, source, dataset, samples=samples, seed=seed, task=manifest.task,
        batch=batch or workload.batch[0],
    )  # fmt: skip
    feeds = list(chosen.feeds(progress, "read"))
    threads = threads or default_threads(build)
    peer = open_peer(DENSE, model, threads)
    names = {tensor.name for tensor in graph.inputs}
    execution = Execution(Counter(build.model, threads), chosen, feeds, within(peer, graph, workload))
    path: tuple[SpeedPoint, ...] = ()
    if walk_dials:
        path = measured_path(walk(walk_values, partial(execution.point, all_dials), progress), max_drop)
        all_dials = Dials(all_dials.dials, path)
    runs = []
    for done, speed in enumerate(asked):
        _report(progress, "cost", done, len(asked))
        runs.append(execution(all_dials, dials, speed))
    _report(progress, "cost", len(asked), len(asked))
    whole = _dense_flops(model, feeds, names, threads)
    settings = [all_dials.values(dials, speed) for speed in asked]
    times = _times(build, model, peer, workload, feeds, settings, threads, seconds, progress)
    quality = runs[0].quality
    real, every = _tokens(feeds)
    return CostReport(
        data=str(data), samples=chosen.count, batch=batch or workload.batch[0],
        padding=None if real is None or not every else 1 - real / every, machine=this_machine(threads),
        versions=package_versions(), dense_flops=whole / chosen.count, dense_ms=times[0],
        measured=quality.measured if quality is not None else None,
        dense_score=None if quality is None or quality.drop is None else quality.score + quality.drop / 100,
        settings=tuple(
            _setting(speed, values, run, whole, chosen.count, real, ms, times[0])
            for speed, values, run, ms in zip(asked, settings, runs, times[1:], strict=True)
        ),
        path=path, warnings=tuple(warnings),
    )  # fmt: skip


def _setting(
    speed: float | None, dials: dict[str, float], run: Executed, whole: int, samples: int, tokens: int | None,
    ms: float | None, dense_ms: float | None,
) -> SettingCost:  # fmt: skip
    passages = run.cost.passages
    sizes = {
        "samples": samples,
        "tokens": tokens or max((p.entered for p in passages if p.what == "tokens"), default=0),
    }
    return SettingCost(
        speed=speed, dials=dials, flops=run.cost.flops / samples, fewer=whole / max(run.cost.flops, 1),
        quality=run.quality, exits={layers: count / samples for layers, count in run.exits.items()},
        kept=tuple(_kept(passage, sizes[passage.what]) for passage in passages), ms=ms,
        faster=None if ms is None or dense_ms is None else dense_ms / ms,
    )  # fmt: skip


def _kept(passage: Passage, whole: int) -> Kept:
    entered, stayed = (rows / max(whole, 1) for rows in (passage.entered, passage.stayed))
    return Kept(where=passage.where, what=passage.what, entered=entered, stayed=stayed)


def _times(
    build: Build, model: Path, peer: Run, workload: Workload, feeds: Feeds, settings: Sequence[dict[str, float]],
    threads: int, seconds: float, progress: Progress | None,
) -> list[float | None]:  # fmt: skip
    """Milliseconds of one call of the dense model, and of the build at each setting; None where nothing is timed."""
    if not seconds:
        return [None] * (1 + len(settings))
    engine = load(build.path, threads=threads, verify=False)
    target = build.manifest.target
    dense = peer if target == "onnxruntime" else dense_engine(target, model, workload, threads)
    runs: list[Run] = [dense]
    runs += [converting(partial(engine.run, dials=setting), engine.inputs) for setting in settings]
    graph = load_graph(model)
    fitted = [within(run, graph, workload) for run in runs]
    alone = interleave({"dense": partial(_all, fitted[0], feeds[:1])}, seconds=0, block=1, warmup=1)["dense"].median_ms
    calls = max(1, int(min(len(feeds), 1000 * seconds / (_ROUNDS * len(runs) * alone))))
    _report(progress, "time", 0, 1)
    timings = interleave(
        {str(number): partial(_all, run, feeds[:calls]) for number, run in enumerate(fitted)}, seconds=seconds, block=1,
        warmup=1, rest=REST_S,
    )  # fmt: skip
    _report(progress, "time", 1, 1)
    return [timing.median_ms / calls for timing in timings.values()]


def _all(run: Run, feeds: Feeds) -> None:
    for feed in feeds:
        run(feed)


def _dense_flops(model: Path, feeds: Feeds, names: set[str], threads: int) -> int:
    """FLOPs of the dense model on all `feeds`. Batches of one shape take the same FLOPs."""
    count = Counter(model, threads)
    flops_of_shape: dict[Any, int] = {}
    total_flops = 0
    for feed in feeds:
        inputs = {name: value for name, value in feed.items() if name in names}
        shape = tuple((name, value.shape) for name, value in sorted(inputs.items()))
        if shape not in flops_of_shape:
            flops_of_shape[shape] = count(inputs).flops
        total_flops += flops_of_shape[shape]
    return total_flops


def _tokens(feeds: Feeds) -> tuple[int | None, int | None]:
    """Number of real tokens of texts, and number of all tokens with padding."""
    masks = [feed["attention_mask"] for feed in feeds if "attention_mask" in feed]
    return (sum(int((m != 0).sum()) for m in masks), sum(m.size for m in masks)) if masks else (None, None)


def _report(progress: Progress | None, what: str, done: int, count: int) -> None:
    if progress:
        progress(what, done, count)
