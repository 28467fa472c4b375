"""`trimtab bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.compiler.builds.build import open_build
from trimtab.compiler.checks.bench import bench, parse_shapes
from trimtab.compiler.checks.decoders.engines import DECODER_PEERS
from trimtab.compiler.checks.peers import PEER_NAMES
from trimtab.compiler.checks.speed import COMPILED, Bench, Machine, TimedRun, key
from trimtab.compiler.checks.timing import LONGEST_S
from trimtab.compiler.cli import console, options
from trimtab.compiler.cli.dials import parse_dials

_BAR = 30  # characters of the longest bar


def command(
    build: options.BuildFolder,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"Further engine to time; may be repeated. Encoders: {', '.join(PEER_NAMES)}. Decoders: "
            f"{', '.join(DECODER_PEERS)}.",
        ),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            help="Shapes to time, BATCHxTOKENS, separated by commas; of a decoder, shapes of prompts. Default: the "
            "workload's smallest and typical batch with its typical tokens; of a decoder, typical batch and past."
        ),
    ] = None,
    threads: options.Threads = None,
    seconds: Annotated[
        float, typer.Option(min=0, max=LONGEST_S, help="Seconds of timing for each shape, all engines together.")
    ] = 10.0,
    dense: options.Dense = None,
    speed: options.Speed = None,
    dial: options.Dial = None,
    trusted_hash: options.TrustedHash = None,
    peer_data: options.PeerData = None,
    gguf: Annotated[
        Path | None,
        typer.Option(
            help="GGUF file that the peer llama.cpp runs. Default: the file that the build was compiled from."
        ),
    ] = None,
    llama_python: Annotated[
        Path | None, typer.Option(help="Python interpreter with llama-cpp-python, for the peer llama.cpp.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Time a build beside its dense model in one run.

    The engines take turns in short blocks, with the same threads and inputs: the build, dense float32, dense with
    dynamic int8 weights, and the given peers. For a decoder, prompts and steps are timed separately, each engine in its
    own process. The numbers are stored in the build's measured.json and report.md.
    """
    wanted = parse_shapes(shapes) if shapes else None
    with console.progress() as progress:
        result = bench(
            open_build(build, trusted_hash=trusted_hash),
            peers=peer or (),
            shapes=wanted,
            threads=threads,
            seconds=seconds,
            dense=dense,
            dials=parse_dials(dial),
            speed=speed,
            data=peer_data,
            gguf=gguf,
            llama_python=llama_python,
            progress=progress,
        )
    if json:
        console.emit_json(result.model_dump(mode="json"))
        return
    print(describe(result.machine))
    if result.steps:
        _show_decoder(result)
    else:
        _show(result)


def describe(machine: Machine) -> str:
    """The processor, its instruction sets and the threads used, on one line."""
    instructions = f" ({', '.join(machine.instructions)})" if machine.instructions else ""
    return f"{machine.cpu}{instructions}, {machine.threads} of {machine.cores} threads"


def _show(result: Bench) -> None:
    longest = {_shape(run): max(r.median_ms for r in result.runs if _shape(r) == _shape(run)) for run in result.runs}
    rows = [
        (
            _shape(run), run.name, f"{run.median_ms:8.2f}", f"{run.p95_ms:8.2f}", f"{run.ratio:5.2f}x",
            "█" * max(1, round(_BAR * run.median_ms / longest[_shape(run)])),
        )
        for run in result.runs
    ]  # fmt: skip
    console.print_table(("shape", "engine", "median ms", "p95 ms", "ratio", ""), rows)

    print()
    for name in _peers(result):
        faster, overall = result.speedup[key(name)], result.geomean[key(name)]
        print(f"{faster:.2f} times as fast as {name}{_mark(result, name)}; {overall:.2f} over all shapes")


def _show_decoder(result: Bench) -> None:
    """A row for each engine and prompt: the first token, then each one more."""
    prompts = {(run.name, run.batch, run.tokens): run for run in result.runs if not run.past}
    rows = []
    for step in result.steps:
        prompt = prompts[step.name, step.batch, step.past]
        rows.append(
            (
                f"{step.batch}x{step.past}", step.name, f"{prompt.median_ms:8.1f}", f"{prompt.ratio:5.2f}x",
                f"{step.median_ms:8.2f}", f"{step.p95_ms:8.2f}", f"{1000 * step.batch / step.median_ms:8.1f}",
                f"{step.ratio:5.2f}x", f"{step.memory_mb:6.0f}",
            )
        )  # fmt: skip
    columns = ("prompt", "engine", "first token ms", "ratio", "ms a step", "p95 ms", "tokens/s", "ratio", "memory MB")
    console.print_table(columns, rows)
    print()
    for name in _peers(result):
        print(f"{result.speedup[key(name)]:.2f} times as fast a step as {name}{_mark(result, name)}")


def _peers(result: Bench) -> list[str]:
    return list(dict.fromkeys(run.name for run in result.runs if run.name != COMPILED))


def _mark(result: Bench, name: str) -> str:
    return " (like for like)" if key(name) == result.like_for_like else ""


def _shape(run: TimedRun) -> str:
    return str(run.batch) if run.tokens is None else f"{run.batch}x{run.tokens}"
