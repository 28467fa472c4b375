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
from trimtab.compiler.cli import console
from trimtab.compiler.cli.dials import DIAL_HELP, SPEED_HELP, parse_dials


def command(
    build: Annotated[Path, typer.Argument(help="Build directory.", show_default=False)],
    data: Annotated[
        Path | None, typer.Option(help="Held-out data to measure the task on: .txt, .jsonl, .tsv or .npz.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Of the data, at most. Default: all.")] = None,
    max_error: Annotated[
        float | None, typer.Option(min=0, help="Largest relative error |y - dense| / |dense| of an output.")
    ] = None,
    min_quality: Annotated[
        float | None,
        typer.Option(
            min=-1,
            max=1,
            help="Least accuracy, micro-F1, NDCG@10, rank correlation, mean cosine, agreement, or dense by compiled "
            "perplexity: what the data and the task give.",
        ),
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Most points of accuracy, micro-F1, NDCG or rank correlation lost, by labels.")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help=f"Measure the task with this one too; may be given again. Known: {', '.join(PEER_NAMES)}."),
    ] = None,
    peer_data: Annotated[
        Path | None, typer.Option(help="What openvino-int8 is calibrated on: the build's own calibration data.")
    ] = None,
    dense: Annotated[
        Path | None, typer.Option(help="The dense ONNX file. Default: the one it was compiled from.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random inputs.")] = 0,
    speed: Annotated[float | None, typer.Option(help=SPEED_HELP, show_default=False)] = None,
    dial: Annotated[list[str] | None, typer.Option(help=DIAL_HELP, show_default=False)] = None,
    trusted_hash: Annotated[str | None, typer.Option(help=console.TRUSTED_HELP, show_default=False)] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 on a warning, too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Compare a build with its dense model, numerically and on a task.

    Runs both at every corner of the workload, with and without padding, and a batch against its samples alone. Exits
    with 1 if an output is NaN or Inf, a batch changes its samples, or a given limit is broken. Where no limit is given,
    a figure beyond default bounds is a warning, which exits with 0 unless `--strict` is given.
    """
    with console.progress() as progress:
        found = validate(
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
        console.emit_json(as_json(found))
    else:
        _show(found)
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if found.failures or (strict and found.warnings):
        raise typer.Exit(1)


def as_json(found: Validation) -> dict[str, Any]:
    """What --json prints."""
    return {"passed": found.passed} | found.model_dump(mode="json")


def _show(found: Validation) -> None:
    console.print_table(
        ("output", "worst at", "max abs", "mean abs", "relative L2", "cosine"),
        [
            (what, e.where, *map(_number, (e.max_abs, e.mean_abs, e.relative_l2, e.cosine)))
            for what, e in in_brief(found.outputs, lambda e: e.severity)
        ],
    )
    if found.consistency:
        print()
        console.print_table(
            ("output", "in a batch against alone", "allowed"),
            [
                (what, _number(c.difference), _number(c.allowed))
                for what, c in in_brief(found.consistency, lambda c: c.difference - c.allowed)
            ],
        )
    if found.quality:
        print()
        for line in found.quality.lines():
            print(line)
    if found.quality and found.peers:
        print()
        rows = quality_rows(found.quality, found.peers)
        columns = list(rows[0])
        console.print_table(
            [column.replace("_", " ") for column in columns],
            [[each if isinstance(each := row[column], str) else f"{each:.4f}" for column in columns] for row in rows],
        )
    print()
    for failure in found.failures:
        print(f"FAILED: {failure}")
    if found.passed:
        print(f"passed: {'; '.join(found.judged)}")
    if not found.judged:
        print(
            "no limit was given: nothing was judged but NaN, Inf, missing outputs and batches that change their "
            "samples (limits are --max-error, and with --data --min-quality and --max-drop)"
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
