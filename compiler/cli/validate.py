"""`trimtab validate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.compiler.builds.build import open_build
from trimtab.compiler.checks.measure import in_brief
from trimtab.compiler.checks.peer_quality import quality_rows
from trimtab.compiler.checks.peers import PEER_NAMES
from trimtab.compiler.checks.validate import Limits, Validation, validate
from trimtab.compiler.cli import console, options
from trimtab.compiler.cli.dials import parse_dials


def command(
    build: options.BuildFolder,
    data: Annotated[
        Path | None, typer.Option(help="Held-out data of the task: .txt, .jsonl, .tsv (plain or .gz) or .npz.")
    ] = None,
    samples: options.Samples = None,
    max_error: Annotated[
        float | None, typer.Option(min=0, help="Limit: largest relative error |y - dense| / |dense| of an output.")
    ] = None,
    min_quality: Annotated[
        float | None,
        typer.Option(
            min=-1,
            max=1,
            help="Limit: smallest quality. The task and the data decide the measure: accuracy, micro-F1, NDCG@10, rank "
            "correlation, mean cosine, agreement, or dense perplexity divided by the build's.",
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=-100, max=100, help="Limit: largest loss against the dense model, in points of the labels' measure."
        ),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"Further engine whose quality is measured; may be repeated. Known: {', '.join(PEER_NAMES)}.",
        ),
    ] = None,
    peer_data: options.PeerData = None,
    dense: options.Dense = None,
    threads: options.Threads = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random inputs.")] = 0,
    speed: options.Speed = None,
    dial: options.Dial = None,
    trusted_hash: options.TrustedHash = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with status 1 on a warning, too.")] = False,
    json: options.Json = False,
) -> None:
    """Compare a build with its dense model: numbers and task quality.

    Both run at every corner of the workload, with and without padding, and each sample also runs alone. The exit status
    is 1 where an output is NaN or Inf, where a sample's result depends on its batch, or where a given limit is broken.
    Without a given limit, a figure beyond the default bounds is a warning: exit status 0, or 1 with `--strict`.
    """
    with console.progress() as progress:
        result = validate(
            open_build(build, trusted_hash=trusted_hash),
            data=data,
            dense=dense,
            dials=parse_dials(dial),
            speed=speed,
            samples=samples,
            limits=Limits(max_error=max_error, min_quality=min_quality, max_drop=max_drop),
            peers=peer or (),
            peer_data=peer_data,
            threads=threads,
            seed=seed,
            progress=progress,
        )
    if json:
        console.emit_json(as_json(result))
    else:
        _show(result)
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if result.failures or (strict and result.warnings):
        raise typer.Exit(1)


def as_json(result: Validation) -> dict[str, Any]:
    """What --json prints."""
    return {"passed": result.passed} | result.model_dump(mode="json")


def _show(result: Validation) -> None:
    console.print_table(
        ("output", "worst at", "max abs", "mean abs", "relative L2", "cosine"),
        [
            (what, e.where, *map(_number, (e.max_abs, e.mean_abs, e.relative_l2, e.cosine)))
            for what, e in in_brief(result.outputs, lambda e: e.severity)
        ],
    )
    if result.consistency:
        print()
        console.print_table(
            ("output", "in a batch against alone", "allowed"),
            [
                (what, _number(c.difference), _number(c.allowed))
                for what, c in in_brief(result.consistency, lambda c: c.difference - c.allowed)
            ],
        )
    if result.quality:
        print()
        for line in result.quality.lines():
            print(line)
    if result.quality and result.peers:
        print()
        rows = quality_rows(result.quality, result.peers)
        columns = list(rows[0])
        console.print_table(
            [column.replace("_", " ") for column in columns],
            [[each if isinstance(each := row[column], str) else f"{each:.4f}" for column in columns] for row in rows],
        )
    print()
    for failure in result.failures:
        print(f"FAILED: {failure}")
    if result.passed:
        print(f"passed: {'; '.join(result.judged)}")
    if not result.judged:
        print(
            "no limit was given: nothing was judged but NaN, Inf, missing outputs and batches that change their "
            "samples (limits are --max-error, and with --data --min-quality and --max-drop)"
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
