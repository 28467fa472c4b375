"""A build that decodes, timed beside its peers: prompts, and steps behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from trimtab.compiler.builds.build import Build
from trimtab.compiler.checks.decoders.engines import DECODER_PEERS, OtherEngines
from trimtab.compiler.checks.decoders.timing import own, time_decoders
from trimtab.compiler.checks.peers import DENSE, INT8, PeerModel
from trimtab.compiler.checks.peers.ort import quantized
from trimtab.compiler.checks.speed import COMPILED, TimedRun
from trimtab.compiler.decoder_cache import pasts
from trimtab.compiler.phases import Progress
from trimtab.compiler.workload import Workload
from trimtab.passes.errors import TargetError

_PROMPT = 128  # tokens of a prompt where the workload tells of no past


def decodes(build: Build) -> bool:
    """Whether its engine goes on from a cache, step by step, in ONNX Runtime."""
    return build.manifest.target == "onnxruntime" and bool(pasts(tensor.name for tensor in build.manifest.inputs))


def usual_prompt(build: Build) -> tuple[int, int]:
    """(batch, tokens) that a decoder is timed with where none are asked for."""
    workload = Workload.model_validate(build.manifest.workload)
    most = build.manifest.positions.most - 1 if build.manifest.positions else _PROMPT
    wanted = workload.past[1] or max(workload.tokens[1], min(workload.tokens[2], _PROMPT))
    return workload.batch[1], max(1, min(wanted, most))


def other_engines(
    build: Build, peers: Sequence[str], shapes: Sequence[tuple[int, int]], gguf: Path | None, llama_python: Path | None
) -> OtherEngines:
    """What those of `peers` start from that time decoders alone.

    Raises:
        TargetError: the build is no decoder, or one of them cannot be started.
    """
    found, wanted = OtherEngines(Path(build.manifest.origin), gguf, llama_python), []
    for name in peers:
        if name in DECODER_PEERS:
            if not decodes(build):
                raise TargetError(
                    f"peer {name!r} times the steps of decoders, and this build has none for ONNX Runtime",
                    hint="leave it out",
                )
            wanted.append(name)
        elif decodes(build) and name not in (DENSE, INT8):
            raise TargetError(
                f"peer {name!r} does not time a decoder's steps", hint=f"those that do: {', '.join(DECODER_PEERS)}"
            )
    found.check(wanted, max((batch for batch, _ in shapes), default=1))
    return found


def time_decoder(
    build: Build,
    model: PeerModel,
    others: OtherEngines,
    peers: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    *,
    threads: int,
    seconds: float,
    setting: Mapping[str, float],
    progress: Progress | None,
) -> tuple[dict[tuple[int, int], list[TimedRun]], dict[str, float]]:
    """Prompts and steps by shape, and the memory of each engine at the last one."""
    engines = {COMPILED: own(build.path), DENSE: own(model.canonical), INT8: own(quantized(model.canonical))}
    for name in peers:
        if name in DECODER_PEERS:
            engines[name] = others.child(name)
    bounds = next(tensor.bounds for tensor in build.manifest.inputs if tensor.name == "input_ids")
    found, memory = {}, {}
    for batch, tokens in shapes:
        timings = time_decoders(
            engines, context=tokens, vocabulary=bounds[1] + 1 if bounds else 2, batch=batch, threads=threads,
            seconds=seconds, options={COMPILED: {"dials": dict(setting)}}, progress=progress,
        )  # fmt: skip
        ours = timings[COMPILED]
        found[batch, tokens] = [
            TimedRun(
                name=name, batch=batch, tokens=count, past=past, median_ms=timing.median_ms, p95_ms=timing.p95_ms,
                samples=timing.samples, ratio=timing.median_ms / one.median_ms,
            )
            for name, each in timings.items()
            for count, past, timing, one in (
                (tokens, 0, each.prompt, ours.prompt), (1, tokens, each.step, ours.step)
            )
        ]  # fmt: skip
        memory = {name: each.resident_bytes / 1e6 for name, each in timings.items()}
    return found, memory
