"""`trimtab compile`: model in, build directory out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.compiler.cli import console, options

if TYPE_CHECKING:
    from trimtab.compiler.builds.build import Build
    from trimtab.compiler.builds.manifest import LeftPlace, PassReport

_LOSS = 0.01  # nats a token, from which a loss is worth a line
_MANY = 3  # places of one reason beside the first, that are counted and no longer named


def command(
    model: options.Model,
    out: Annotated[Path, typer.Option("--output", "-o", help="Build directory to write.", show_default=False)],
    recipe: Annotated[
        Path | None,
        typer.Argument(help="Recipe: a YAML file. Default: ffn-split with its defaults.", show_default=False),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Target, as `trimtab targets` lists them; overrides the recipe's.", show_default=False),
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(help="Number of processes that share the model; overrides the recipe's.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Calibration data: .txt, .jsonl, .tsv (plain or .gz) or .npz.", show_default=False),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="Profile of `trimtab calibrate` or `train`. Default: profile.safetensors in the model's folder."
        ),
    ] = None,
    settings: options.RecipeChanges = None,
    force: Annotated[bool, typer.Option("--force", help="Compile even where the build is up to date.")] = False,
    allow_pickle: options.AllowPickle = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the manifest and its hash as JSON, and nothing else, on stdout.")
    ] = False,
) -> None:
    """Compile a model into a build directory, which appears whole or not at all."""
    from trimtab.compiler.learned import remedies
    from trimtab.compiler.pipeline import compile_model
    from trimtab.compiler.recipe import load_recipe, override

    asked, changes = override(load_recipe(recipe), settings or []), [*(settings or [])]
    changes += [f"{key}={value}" for key, value in (("target", target), ("shards", shards)) if value is not None]
    with (
        remedies(model=model, recipe=recipe, settings=changes, data=data, profile=profile),
        console.progress() as progress,
    ):
        build = compile_model(
            model, asked, out, data=data, profile=profile, target=target, shards=shards, progress=progress,
            force=force, allow_pickle=allow_pickle,
        )  # fmt: skip
    if json:
        console.emit_json(build.manifest.model_dump(mode="json") | {"manifest_sha256": build.hash})
    else:
        _show(build, out)


def _left(places: Sequence[LeftPlace]) -> Iterator[str]:
    """A line for each place that a pass left, or for all of one reason where those are many; the report has each."""
    reasons: dict[str, list[str]] = {}
    for place in places:
        reasons.setdefault(place.why, []).append(place.where)
    for why, (first, *others) in reasons.items():
        if len(others) >= _MANY:
            yield f"{first} and {len(others)} more: {why}"
        else:
            yield from (f"{where}: {why}" for where in (first, *others))


def _losses(passes: Sequence[PassReport]) -> list[str]:
    """A line for each pass whose own measure on held-out states says that quality goes.

    A divergence of d nats a token from the dense distribution makes text of that distribution e^d times as perplexing.
    """
    lines = []
    for name, details in ((report.name, report.details) for report in passes):
        nats, error = float(details.get("divergence", 0)), float(details.get("error", 0))
        if nats >= _LOSS:
            lines.append(f"{name}: {nats:.3f} nats a token from the dense model on held-out states, about "
                         f"{math.expm1(nats):.0%} of perplexity")  # fmt: skip
        if not error < _LOSS:
            lines.append(f"{name}: the FFNs' outputs on held-out states have a squared error of {error:.3f} of their "
                         "variance, the mean over all layers")  # fmt: skip
    return lines


def _show(build: Build, out: Path) -> None:
    from trimtab.compiler.builds.report import megabytes, share
    from trimtab.compiler.checks.measure import in_brief

    manifest = build.manifest
    sizes = manifest.sizes
    if build.reused:
        print(f"{out} is up to date: nothing to do (--force compiles it again)\n")
    rows = [
        (name, megabytes(dense), megabytes(compiled), share(compiled, dense))
        for name, dense, compiled in (
            ("all weights", sizes.dense_bytes, sizes.compiled_bytes),
            ("FFN weights", sizes.dense_ffn_bytes, sizes.compiled_ffn_bytes),
        )
    ]
    losses = _losses(manifest.passes)  # first and last, where they are seen
    for line in losses:
        print(f"note: {line}")
    console.print_table(("", "dense", "compiled", "of dense"), rows)
    print()
    for report in manifest.passes:
        print(f"{report.name}: {report.changed} changed, {len(report.left)} left")
        for line in _left(report.left):
            print(f"  left {line}")
    for what, error in in_brief(manifest.check.outputs, lambda error: error.severity):
        print(f"{what}: differs from dense by {error.relative_l2:.2g} (relative; on random inputs, unlike data)")
    if manifest.check.why:
        print(f"not compared with the dense model: {manifest.check.why}")
    if manifest.profile_origin:
        print(f"profile: {manifest.profile_origin}")
    seconds = sum(manifest.seconds.values())
    done = f"built for {manifest.target} in {seconds:.1f} s" if not build.reused else f"a build for {manifest.target}"
    print(f"\n{out}: {done}; see {out / 'report.md'}")
    print(f"sha256 of its manifest, for --trusted-hash: {build.hash}")
    for line in losses:
        print(f"note: {line}")
    print(f"next: trimtab validate {out} --data HELD_OUT    trimtab bench {out}")
