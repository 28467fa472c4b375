"""Times a decoder build beside its peers: prompts, and steps behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from trimtab.compiler.builds.build import Build
from trimtab.compiler.checks.decoders.engines import DECODER_PEERS, OtherEngines
from trimtab.compiler.checks.decoders.timing import Start, time_decoders
from trimtab.compiler.checks.peers import DENSE, INT8, PeerModel
from trimtab.compiler.checks.peers.ort import quantized
from trimtab.compiler.checks.speed import COMPILED, TimedRun
from trimtab.compiler.decoder_cache import pasts
from trimtab.compiler.progress import Progress
from trimtab.compiler.workload import Workload
from trimtab.passes.errors import RecipeError, TargetError

_PROMPT = 128  # tokens of a prompt where the workload has no past


def decodes(build: Build) -> bool:
    """Whether the engine of `build` takes steps in ONNX Runtime with a cache that is updated in place.

    Where the cache grows by concatenation, a step behind the same number of tokens cannot be repeated.
    """
    manifest = build.manifest
    in_place = {mask.past for mask in manifest.packed} & set(pasts(tensor.name for tensor in manifest.inputs))
    return manifest.target == "onnxruntime" and bool(in_place)


def usual_prompt(build: Build) -> tuple[int, int]:
    """(batch, tokens) of the prompt with which a decoder is timed by default."""
    workload = Workload.model_validate(build.manifest.workload)
    longest = build.manifest.positions.most - 1 if build.manifest.positions else _PROMPT
    prompt = workload.past[1] or max(workload.tokens[1], min(workload.tokens[2], _PROMPT))
    return workload.batch[1], max(1, min(prompt, longest))


def other_engines(
    build: Build, peers: Sequence[str], shapes: Sequence[tuple[int, int]], gguf: Path | None, llama_python: Path | None
) -> OtherEngines:
    """The models of those `peers` that time decoders alone.

    Raises:
        TargetError: the build is no decoder, or a peer cannot be started.
    """
    others, decoder_peers = OtherEngines(Path(build.manifest.origin), gguf, llama_python), []
    for name in peers:
        if name in DECODER_PEERS:
            if not decodes(build):
                raise TargetError(
                    f"peer {name!r} times the steps of decoders for ONNX Runtime whose cache stays in place "
                    "(GroupQueryAttention), which this build is not",
                    hint="leave it out",
                )
            decoder_peers.append(name)
        elif decodes(build) and name not in (DENSE, INT8):
            raise TargetError(
                f"peer {name!r} does not time a decoder's steps", hint=f"those that do: {', '.join(DECODER_PEERS)}"
            )
    others.check(decoder_peers, max((batch for batch, _ in shapes), default=1))
    return others


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
) -> dict[tuple[int, int], list[TimedRun]]:
    """Shape, (batch, tokens) → timed prompts, and steps behind them.

    Raises:
        RecipeError: the model has too few positions for a step behind a prompt.
        TargetError: an engine does not start, or fails.
    """
    positions = build.manifest.positions
    for batch, tokens in shapes:
        if positions is not None and tokens >= positions.most:
            raise RecipeError(
                f"shape {batch}x{tokens}: a step behind {tokens} tokens needs {tokens + 1} positions, and the model "
                f"has {positions.most}",
                hint=f"ask for at most {positions.most - 1}",
            )
    bounds = next(tensor.bounds for tensor in build.manifest.inputs if tensor.name == "input_ids")
    starts = {name: others.start(name) for name in peers if name in DECODER_PEERS}
    int8_model = quantized(model.canonical)
    threads_of_rank = max(1, threads // build.manifest.shards)
    timed_runs = {}
    for batch, tokens in shapes:
        engines = {
            COMPILED: Start.own(build.path, batch=batch, dials=dict(setting), threads=threads_of_rank),
            DENSE: Start.own(model.canonical, batch=batch, dense=True),
            INT8: Start.own(int8_model, batch=batch, dense=True),
            **starts,
        }
        timings = time_decoders(
            engines, context=tokens, vocabulary=bounds[1] + 1 if bounds else 2, threads=threads, seconds=seconds,
            progress=progress,
        )  # fmt: skip
        timed_runs[batch, tokens] = [
            TimedRun(
                name=name, batch=batch, tokens=count, past=past, median_ms=timing.median_ms, p95_ms=timing.p95_ms,
                samples=timing.samples, ratio=timing.median_ms / ours.median_ms, memory_mb=each.resident_bytes / 1e6,
            )
            for name, each in timings.items()
            for count, past, timing, ours in (
                (tokens, 0, each.prompt, timings[COMPILED].prompt), (1, tokens, each.step, timings[COMPILED].step)
            )
        ]  # fmt: skip
    return timed_runs
