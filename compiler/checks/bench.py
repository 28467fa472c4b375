"""`trimtab bench`: how fast is a build beside its dense model? All engines take turns, with the same threads."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import psutil
from pydantic import BaseModel, ConfigDict
from scipy.stats import gmean

from trimtab.compiler.builds.build import Build, of_one_build
from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.builds.writer import record
from trimtab.compiler.checks.peers import DENSE, INT8, check_peers, open_peer, peer_model
from trimtab.compiler.checks.peers.same_target import dense_engine
from trimtab.compiler.checks.timing import REST_S, interleave
from trimtab.compiler.engine import load
from trimtab.compiler.feeds import Run, random_feeds
from trimtab.compiler.inputs import check_sizes
from trimtab.compiler.phases import Progress
from trimtab.compiler.workload import Workload
from trimtab.passes.errors import RecipeError
from trimtab.passes.graph import load_graph
from trimtab.passes.graph.positions import find_positions

COMPILED = "compiled"
_INSTRUCTIONS = {
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm",
    "bf16", "sve",
}  # fmt: skip
"""As Linux names them."""

_KEYS = {DENSE: "vs_dense", INT8: "vs_int8"}
"""Peer → its key among the speedups; another peer's is its own name after "vs_"."""


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True)


class TimedRun(_Result):
    """One engine at one shape.

    Attributes:
        name: "compiled", or the peer's.
        tokens: None for a model without them.
        median_ms, p95_ms: of one call, in milliseconds.
        samples: calls timed.
        ratio: its median over that of the compiled engine at this shape: above 1, compiled is faster.
    """

    name: str
    batch: int
    tokens: int | None
    median_ms: float
    p95_ms: float
    samples: int
    ratio: float


class Machine(_Result):
    """Where it was measured.

    Attributes:
        instructions: the vector instruction sets of the processor that decide how fast matrix products are.
    """

    cpu: str
    cores: int
    threads: int
    instructions: tuple[str, ...] = ()


class Bench(_Result):
    """What was measured.

    Attributes:
        speedup: how many times as fast as each peer the compiled engine is, at the workload's opt shape, or at the
            last shape where that was not timed. `vs_int8` is None where that peer was not run.
        geomean: the same, as the geometric mean over all shapes.
        like_for_like: the key of the dense peer of the same precision.
        setting: dial → its value, for builds that have dials.
    """

    target: str
    machine: Machine
    versions: dict[str, str]
    runs: tuple[TimedRun, ...]
    speedup: dict[str, float | None]
    geomean: dict[str, float | None]
    like_for_like: str
    setting: dict[str, float] = {}


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
    progress: Progress | None = None,
) -> Bench:
    """Time the engine of `build` and its peers, and record the result beside it.

    Args:
        peers: beside the dense model on the engine's own target, and dynamic int8 where that is ONNX Runtime.
        shapes: (batch, tokens) to time; by default the least and the opt batch, at opt tokens.
        threads: of every engine, which shards share; by default those of the recipe, else one per physical core.
        seconds: for each shape, all engines together.
        dense: the dense ONNX file; by default the one that the build was compiled from.
        data: what peers that are calibrated statically are calibrated on, as the build's recipe says.
        dials, speed: the setting at which the build runs, as `Engine.run` takes them.

    Raises:
        TrimtabError: the build is damaged or was replaced meanwhile, its target or dense model is missing, or a peer
            cannot run.
    """
    check_peers(peers)  # before minutes of work
    setting = build.manifest.all_dials.values(dials, speed)
    workload = Workload.model_validate(build.manifest.workload)
    shards = build.manifest.shards
    threads = threads or default_threads(build)
    shapes = shapes or list(dict.fromkeys((size, workload.tokens[1]) for size in workload.batch[:2]))
    model = peer_model(build, dense=dense, data=data)
    graph = load_graph(model.canonical)
    positions = find_positions(graph)
    for batch, tokens in shapes:
        check_sizes(f"shape {batch}x{tokens}", tokens, 0, positions)
    engine = load(build.path, threads=max(1, threads // shards), verify=False)
    runs: dict[str, Run] = {COMPILED: partial(engine.run, dials=dials, speed=speed)}
    if build.manifest.target == "onnxruntime":
        peers = [DENSE, INT8, *peers]
    else:
        runs[DENSE] = dense_engine(build.manifest.target, model.canonical, workload, threads)
    runs |= {name: open_peer(name, model, threads) for name in peers if name not in runs}
    timed = time_runs(runs, graph, workload, shapes, seconds=seconds, progress=progress)
    opt = (workload.batch[1], workload.tokens[1])
    found = Bench(
        target=build.manifest.target,
        machine=this_machine(threads),
        versions=package_versions(),
        runs=tuple(run for each in timed.values() for run in each),
        speedup=speedups(timed[opt] if opt in timed else list(timed.values())[-1]),
        geomean=speedups([run for each in timed.values() for run in each]),
        setting=setting,
        like_for_like=_KEYS[INT8 if any("dynamic-int8" in step for step in build.manifest.recipe["passes"]) else DENSE],
    )
    record(build, speed=_summary(found))
    return found


def default_threads(build: Build) -> int:
    """Threads that engines get where none are asked for: those of the recipe, else one per physical core."""
    wished = (build.manifest.recipe.get("threads") or 0) * build.manifest.shards
    return wished or psutil.cpu_count(logical=False) or os.cpu_count() or 1


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
    found = {}
    for done, (batch, tokens) in enumerate(shapes):
        if progress:
            progress("bench", done, len(shapes))
        feeds = random_feeds(graph, {**others, "batch": batch, "tokens": tokens}, rng)
        timings = interleave({name: partial(run, feeds) for name, run in runs.items()}, seconds=seconds, rest=REST_S)
        ours = timings[COMPILED].median_ms
        found[batch, tokens] = [
            TimedRun(
                name=name, batch=batch, tokens=tokens if "tokens" in axes else None, median_ms=timing.median_ms,
                p95_ms=timing.p95_ms, samples=timing.samples, ratio=timing.median_ms / ours,
            )
            for name, timing in timings.items()
        ]  # fmt: skip
    if progress:
        progress("bench", len(shapes), len(shapes))
    return found


def speedups(runs: Sequence[TimedRun]) -> dict[str, float | None]:
    """Peer's key → how many times as fast compiled is, as the geometric mean over `runs`."""
    names = list(dict.fromkeys(run.name for run in runs if run.name != COMPILED))
    means = {key(name): float(gmean([run.ratio for run in runs if run.name == name])) for name in names}
    return dict.fromkeys(_KEYS.values()) | means


def key(peer: str) -> str:
    """The peer's key among the speedups: "dense-fp32" → "vs_dense", "openvino-bf16" → "vs_openvino_bf16"."""
    return _KEYS.get(peer, "vs_" + peer.replace("-", "_"))


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """ "1x48,8x48" → [(1, 48), (8, 48)].

    Raises:
        RecipeError: not of that form, or a size below 1.
    """
    found = []
    for part in text.split(","):
        sizes = part.strip().lower().split("x")
        if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise RecipeError(f"shape {part.strip()!r} is not of the form BATCHxTOKENS", hint="such as 1x48,8x48")
        found.append((int(sizes[0]), int(sizes[1])))
    return found


def _summary(found: Bench) -> dict[str, object]:
    """What measured.json keeps: flat, so that the report shows it as tables."""
    single = {name: round(ratio, 3) for name, ratio in found.speedup.items() if ratio is not None}
    turned = {"setting": ", ".join(f"{k} {v:g}" for k, v in found.setting.items())} if found.setting else {}
    return {
        **single,
        **turned,
        **found.machine.model_dump(mode="json"),
        "runs": [run.model_dump() for run in found.runs],
    }


def this_machine(threads: int) -> Machine:
    """The processor of this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    cpu = fields.get("model name") or platform.processor() or platform.machine()
    flags = fields.get("flags", fields.get("Features", "")).split()
    instructions = tuple(sorted(_INSTRUCTIONS.intersection(flags)))
    return Machine(cpu=cpu, cores=os.cpu_count() or 1, threads=threads, instructions=instructions)
