"""`trimtab generate`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from trimtab.compiler.cli import console, options
from trimtab.compiler.cli.dials import parse_dials
from trimtab.compiler.engine import load
from trimtab.compiler.generation import Sampling
from trimtab.compiler.generation.text import Answer, generate_text


def command(
    build: Annotated[Path, typer.Argument(help="Build directory of a causal language model.", show_default=False)],
    prompt: Annotated[
        list[str], typer.Option(help="Prompt to continue; may be repeated: all are answered in one batch.")
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens of each answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the K likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens that together have this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be repeated.")] = None,
    speed: options.Speed = None,
    dial: options.Dial = None,
    threads: options.Threads = None,
    trusted_hash: options.TrustedHash = None,
    json: options.Json = False,
) -> None:
    """Generate text with a build of a causal language model.

    One answer is printed token by token; several are printed when all are complete.
    """
    if not 0 < top_p <= 1:
        raise typer.BadParameter("lies outside 0..1", param_hint="--top-p")
    engine = load(build, threads=threads, trusted_hash=trusted_hash)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    streams = len(prompt) == 1 and not json
    start, first = time.perf_counter(), 0.0
    answers: list[Answer] = []
    dials = parse_dials(dial)
    for answers in generate_text(
        engine, prompt, max_tokens=max_new_tokens, sampling=sampling, stop=stop or (), dials=dials, speed=speed
    ):
        first = first or time.perf_counter() - start
        if streams:
            print(answers[0].new, end="", flush=True)
    seconds = time.perf_counter() - start
    tokens = sum(len(answer.tokens) for answer in answers)
    if json:
        rows = [
            {"prompt": p, "text": a.text, "tokens": a.tokens, "ended": a.ended}
            for p, a in zip(prompt, answers, strict=True)
        ]
        console.emit_json({"answers": rows, "tokens": tokens, "seconds": seconds, "first_token_seconds": first})
        return
    if not streams:
        for text, answer in zip(prompt, answers, strict=True):
            print(f"{text}{answer.text}\n")
    steps = max(len(answer.tokens) for answer in answers) - 1
    pace = f", then {1000 * (seconds - first) / steps:.1f} ms per step" if steps else ""
    print(f"\n{tokens} tokens; the first after {1000 * first:.0f} ms{pace}", file=sys.stderr)
