"""`trimtab bench`: times a build and its dense model. All engines take turns, with the same number of threads."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from math import inf
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import psutil

from trimtab.compiler.builds.build import Build, of_one_build
from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.builds.writer import record
from trimtab.compiler.checks.decoders.bench import decodes, other_engines, time_decoder, usual_prompt
from trimtab.compiler.checks.decoders.engines import DECODER_PEERS
from trimtab.compiler.checks.peers import DENSE, INT8, check_peers, open_peer, peer_model
from trimtab.compiler.checks.peers.same_target import dense_engine
from trimtab.compiler.checks.speed import COMPILED, KEYS, Bench, TimedRun, speedups, this_machine
from trimtab.compiler.checks.timing import REST_S, interleave
from trimtab.compiler.engine import load
from trimtab.compiler.engine_options import check_threads
from trimtab.compiler.feeds import Run, converting, random_feeds
from trimtab.compiler.inputs import check_sizes
from trimtab.compiler.progress import Progress
from trimtab.compiler.workload import Workload
from trimtab.passes.errors import InputError, RecipeError
from trimtab.passes.graph import load_graph
from trimtab.passes.graph.positions import find_positions


@of_one_build
def bench(
    build: Build,
    *,
    peers: Sequence[str] = (),
    shapes: Sequence[tuple[int, int]] | None = None,
    threads: int | None = None,
    seconds: float = 10.0,
    dense: Path | None = None,
    data: Path | None = None,
    dials: Mapping[str, float] | None = None,
    speed: float | None = None,
    gguf: Path | None = None,
    llama_python: Path | None = None,
    progress: Progress | None = None,
) -> Bench:
    """Time the engine of `build` and its peers, and record the result beside it.

    For a decoder on ONNX Runtime, prompts and steps are timed apart, each engine in a process of its own.

    Args:
        peers: peers to time besides the dense model on the engine's own target, and besides dynamic int8 where that
            target is ONNX Runtime.
        shapes: (batch, tokens) to time; for a decoder, the shapes of prompts. By default the smallest and the opt
            batch, at opt tokens; for a decoder the opt batch, behind as many tokens as the workload's opt past.
        threads: threads of every engine, shared by its shards; by default those of the recipe, else one per physical
            core.
        seconds: timing budget of each shape, for all engines together.
        dense: the dense ONNX file; by default the one that the build was compiled from.
        data: calibration data of peers that are calibrated statically, with the calibration options of the recipe.
        dials, speed: the setting at which the build runs, as `Engine.run` takes them.
        gguf, llama_python: the GGUF file of the peer llama.cpp, and an interpreter with llama-cpp-python; see
            `OtherEngines`.

    Raises:
        TrimtabError: the build is damaged or was replaced meanwhile, its target or dense model is missing, or a peer
            cannot run.
    """
    decoder = decodes(build)
    check_peers(peers, DECODER_PEERS)  # all checks come before minutes of work
    check_threads(threads)
    if not 0 <= seconds < inf:
        raise InputError(f"seconds is {seconds}", hint="give the seconds that each shape is timed, such as 10")
    if decoder:
        shapes = shapes or [usual_prompt(build)]
    others = other_engines(build, peers, shapes or (), gguf, llama_python)
    setting = build.manifest.all_dials.values(dials, speed)
    workload = Workload.model_validate(build.manifest.workload)
    shards = build.manifest.shards
    threads = threads or default_threads(build)
    shapes = shapes or list(dict.fromkeys((size, workload.tokens[1]) for size in workload.batch[:2]))
    model = peer_model(build, dense=dense, data=data)
    graph = load_graph(model.canonical)
    positions = build.manifest.positions or find_positions(graph)
    for batch, tokens in shapes:
        check_sizes(f"shape {batch}x{tokens}", tokens, 0, positions)
    if decoder:
        timed = time_decoder(
            build, model, others, peers, shapes, threads=threads, seconds=seconds, setting=setting, progress=progress
        )
        return _recorded(build, threads, timed, usual_prompt(build), setting)
    engine = load(build.path, threads=max(1, threads // shards), verify=False)
    runs: dict[str, Run] = {COMPILED: converting(partial(engine.run, dials=dials, speed=speed), engine.inputs)}
    if build.manifest.target == "onnxruntime":
        peers = [DENSE, INT8, *peers]
    else:
        runs[DENSE] = dense_engine(build.manifest.target, model.canonical, workload, threads)
    runs |= {name: open_peer(name, model, threads) for name in peers if name not in runs}
    timed = time_runs(runs, graph, workload, shapes, seconds=seconds, progress=progress)
    return _recorded(build, threads, timed, (workload.batch[1], workload.tokens[1]), setting)


def _recorded(
    build: Build,
    threads: int,
    timed: Mapping[tuple[int, int], Sequence[TimedRun]],
    opt: tuple[int, int],
    setting: dict[str, float],
) -> Bench:
    """Record the result of `build` and return it. Its speedup is that of the shape `opt`, or of the last shape."""
    headline = timed[opt] if opt in timed else list(timed.values())[-1]
    result = Bench(
        target=build.manifest.target,
        machine=this_machine(threads),
        versions=package_versions(),
        runs=tuple(run for each in timed.values() for run in each),
        speedup=speedups([run for run in headline if run.past] or headline),
        geomean=speedups([run for each in timed.values() for run in each]),
        setting=setting,
        like_for_like=KEYS[INT8 if any("dynamic-int8" in step for step in build.manifest.recipe["passes"]) else DENSE],
    )
    record(build, speed=_summary(result))
    return result


def default_threads(build: Build) -> int:
    """Threads of each engine where the user names no number: those of the recipe, else one per physical core."""
    recipe_threads = (build.manifest.recipe.get("threads") or 0) * build.manifest.shards
    return recipe_threads or psutil.cpu_count(logical=False) or os.cpu_count() or 1


def time_runs(
    runs: dict[str, Run],
    graph: gs.Graph,
    workload: Workload,
    shapes: Sequence[tuple[int, int]],
    *,
    seconds: float,
    progress: Progress | None = None,
) -> dict[tuple[int, int], list[TimedRun]]:
    """Time `runs`, one of them called "compiled", at each of `shapes` on the same random inputs."""
    axes = {axis for shape in workload.axes(graph).values() for axis in shape}
    others = {name: sizes[1] for name, sizes in workload.dims.items()}
    rng = np.random.default_rng(0)
    timed_runs = {}
    for done, (batch, tokens) in enumerate(shapes):
        if progress:
            progress("bench", done, len(shapes))
        feeds = random_feeds(graph, {**others, "batch": batch, "tokens": tokens}, rng)
        timings = interleave({name: partial(run, feeds) for name, run in runs.items()}, seconds=seconds, rest=REST_S)
        ours = timings[COMPILED].median_ms
        timed_runs[batch, tokens] = [
            TimedRun(
                name=name, batch=batch, tokens=tokens if "tokens" in axes else None, median_ms=timing.median_ms,
                p95_ms=timing.p95_ms, samples=timing.samples, ratio=timing.median_ms / ours,
            )
            for name, timing in timings.items()
        ]  # fmt: skip
    if progress:
        progress("bench", len(shapes), len(shapes))
    return timed_runs


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """ "1x48,8x48" → [(1, 48), (8, 48)].

    Raises:
        RecipeError: not of that form, or a size below 1.
    """
    shapes = []
    for part in text.split(","):
        sizes = part.strip().lower().split("x")
        if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise RecipeError(f"shape {part.strip()!r} is not of the form BATCHxTOKENS", hint="such as 1x48,8x48")
        shapes.append((int(sizes[0]), int(sizes[1])))
    return shapes


def _summary(result: Bench) -> dict[str, object]:
    """What measured.json keeps: flat, so that the report shows it as tables."""
    single = {name: round(ratio, 3) for name, ratio in result.speedup.items() if ratio is not None}
    setting = {"setting": ", ".join(f"{k} {v:g}" for k, v in result.setting.items())} if result.setting else {}
    return {
        **single,
        **setting,
        **result.machine.model_dump(mode="json"),
        "runs": [run.model_dump(exclude=None if result.steps else {"past", "memory_mb"}) for run in result.runs],
    }
