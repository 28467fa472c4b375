"""`trimtab calibrate`: measure a model on data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from trimtab.compiler.cli import console, options


def command(
    model: options.Model,
    data: options.CalibrationData,
    out: Annotated[Path, typer.Option("--output", "-o", help="Profile to write (.safetensors).", show_default=False)],
    recipe: Annotated[
        Path | None,
        typer.Argument(help="Recipe (YAML) for whose passes to measure. Default: what most passes need."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of samples, chosen at random.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per run.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length, in tokens, at which texts are cut.")] = 128,
    states: Annotated[int, typer.Option(min=1, help="Number of inputs of each FFN that are kept, for fits.")] = 4096,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random choices.")] = 0,
    allow_pickle: options.AllowPickle = False,
) -> None:
    """Measure a model on data and write its Profile."""
    from trimtab.compiler.calibrate import calibrate
    from trimtab.compiler.data import read_data
    from trimtab.compiler.recipe import load_recipe
    from trimtab.compiler.sources import open_source
    from trimtab.passes.errors import ProfileError
    from trimtab.passes.needs import DEFAULT, to_measure

    if not os.access(out.absolute().parent, os.W_OK) or out.is_dir():  # known before the work, not after it
        raise ProfileError(f"{out}: cannot be written", hint="give a file in a folder that exists and is writable")
    needs = DEFAULT | to_measure(load_recipe(recipe).needs if recipe is not None else ())
    dataset = read_data(data)
    source = open_source(model, allow_pickle=allow_pickle)
    with console.progress() as progress:
        profile = calibrate(
            source,
            dataset,
            samples=samples,
            batch_size=batch_size,
            max_tokens=max_tokens,
            states=states,
            progress=progress,
            seed=seed,
            needs=needs,
        )
    profile.save(out)
    layers = sum(name.endswith(".states") for name in profile.tensors)
    print(f"{out}: {layers} layers, {profile.info.samples} samples, {profile.info.tokens} tokens")
