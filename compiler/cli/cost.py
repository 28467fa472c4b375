"""`trimtab cost`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.compiler.builds.build import Build, open_build
from trimtab.compiler.checks.cost_plot import check_plot, draw
from trimtab.compiler.checks.cost_report import CostReport, named, setting_row
from trimtab.compiler.checks.measured_cost import SPEEDS, cost
from trimtab.compiler.checks.timing import LONGEST_S
from trimtab.compiler.cli import console, options
from trimtab.compiler.cli.bench import describe
from trimtab.compiler.cli.dials import parse_dials, parse_grid, parse_speeds


def command(
    build: options.BuildFolder,
    data: Annotated[
        Path, typer.Option(help="Data to run: .txt, .jsonl, .tsv (plain or .gz) or .npz.", show_default=False)
    ],
    speeds: Annotated[
        str | None,
        typer.Option(help=f"Speeds to measure, separated by commas. Default: {','.join(f'{s:g}' for s in SPEEDS)}."),
    ] = None,
    dial: options.Dial = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples per call. Default: the smallest batch of the workload.")
    ] = None,
    samples: options.Samples = None,
    threads: options.Threads = None,
    seconds: Annotated[
        float, typer.Option(min=0, max=LONGEST_S, help="Seconds of timing, all engines together; 0 skips it.")
    ] = 10.0,
    store_path: Annotated[
        bool,
        typer.Option("--store-path", help="Try a grid of dial values on the data and store the best path of `speed`."),
    ] = False,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=V,V,...", help="Values of one dial that --store-path tries; may be repeated."),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(min=0, help="Largest loss of --store-path at speed 1, in points of quality. Default: no limit."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Chart file to write: .svg, .png or .pdf.")] = None,
    dense: options.Dense = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of samples.")] = 0,
    trusted_hash: options.TrustedHash = None,
    json: options.Json = False,
) -> None:
    """Measure FLOPs, quality and time of a build at each speed.

    FLOPs are those executed: of real text lengths, of the tokens that are kept, until a sample exits. Quality is
    measured against the labels, or against the dense model where the data has none. The numbers are stored in the
    build's measured.json and report.md.
    """
    if plot is not None:
        check_plot(plot)
    if not store_path and (grid or max_drop is not None):
        raise typer.BadParameter("--grid and --max-drop belong to --store-path")
    with console.progress() as progress:
        report, kept = cost(
            open_build(build, trusted_hash=trusted_hash),
            data=data,
            save_path=store_path,
            speeds=parse_speeds(speeds),
            dials=parse_dials(dial),
            batch=batch_size,
            samples=samples,
            threads=threads,
            seconds=seconds,
            dense=dense,
            seed=seed,
            values=parse_grid(grid),
            max_drop=max_drop,
            progress=progress,
        )
    if plot is not None:
        draw(report, plot)
    if json:
        console.emit_json(report.model_dump(mode="json") | {"manifest_sha256": kept.hash})
    else:
        _show(report, kept)
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _show(report: CostReport, build: Build) -> None:
    print(describe(report.machine))
    padded = f", {report.padding:.1%} of the tokens are padding" if report.padding is not None else ""
    print(f"{report.samples} samples of {report.data} in batches of {report.batch}{padded}")
    time = "" if report.dense_ms is None else f", {report.dense_ms:.2f} ms a call"
    score = "" if report.dense_score is None else f", {report.measured} {report.dense_score:.4f}"
    print(f"dense: {report.dense_flops:.3g} FLOPs a sample{time}{score}\n")
    _print_rows([setting_row(each, report.measured) for each in report.settings])
    if any(each.exits for each in report.settings):
        print("\nshare of the samples by the number of layers that they ran")
        layers = sorted({depth for each in report.settings for depth in each.exits})
        _print_rows([named(s) | {str(depth): s.exits.get(depth, 0.0) for depth in layers} for s in report.settings])
    if any(each.kept for each in report.settings):
        print("\nshare of the tokens and samples that go on")
        places = [f"{passage.where} ({passage.what})" for passage in report.settings[0].kept]
        _print_rows(
            [{"": place} | {f"at {_label(s.speed)}": s.kept[number].stayed for s in report.settings}
             for number, place in enumerate(places)]
        )  # fmt: skip
    if report.path:
        print("\nthe build's path for speed, as it is now")
        _print_rows([{"speed": point.speed} | point.dials for point in report.path])
        print(f"\nsha256 of its manifest, for --trusted-hash: {build.hash}")


def _label(speed: float | None) -> str:
    return "this setting" if speed is None else f"speed {speed:g}"


def _print_rows(rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    console.print_table(columns, [[_cell(row.get(column, "")) for column in columns] for row in rows])


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
