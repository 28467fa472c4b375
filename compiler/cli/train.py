"""`trimtab train`: learn what a pass needs, and keep it in a Profile."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.compiler.cli import console


class Method(str, Enum):
    recover = "recover"


class Train(str, Enum):
    all = "all"
    ffn = "ffn"


def command(
    model: Annotated[str, typer.Argument(help="Hugging Face directory or ONNX file.", show_default=False)],
    data: Annotated[Path, typer.Option(help="Data to learn from; not what you will judge by.", show_default=False)],
    out: Annotated[Path, typer.Option("--output", "-o", help="The Profile to write.", show_default=False)],
    recipe: Annotated[Path, typer.Option(help="The recipe the model will be compiled with.", show_default=False)],
    method: Annotated[Method, typer.Option(help="What to learn.")] = Method.recover,
    profile: Annotated[Path | None, typer.Option(help="Profile to add to; by default measured on the data.")] = None,
    minutes: Annotated[float, typer.Option(min=0, help="Time limit, which the learning rate follows.")] = 10.0,
    steps: Annotated[
        int | None, typer.Option(min=0, help="Follow a number of steps instead, repeatably.", show_default=False)
    ] = None,
    lr: Annotated[float, typer.Option(min=0, help="Highest learning rate.")] = 5e-5,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="Texts are cut there.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of samples.")] = 0,
    train: Annotated[Train, typer.Option(help="All weights but embeddings, or those of the FFNs.")] = Train.all,
    labels_weight: Annotated[
        float, typer.Option(min=0, help="Of the data's labels in the loss, beside the dense model's outputs.")
    ] = 0.0,
    allow_pickle: Annotated[bool, typer.Option(help="Read pickled weights: they can run code.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Learn what a pass needs, and add it to a Profile.

    recover: a short distillation of the model that the recipe's passes make from the dense one. Passes behind `recover`
    in the recipe are not run while learning, but it learns with the rounding that they bring.
    """
    from trimtab.compiler.data import read_data
    from trimtab.compiler.profiling import measured_profile
    from trimtab.compiler.recipe import load_recipe
    from trimtab.compiler.sources import open_source
    from trimtab.compiler.targets import get_target
    from trimtab.passes.errors import ProfileError, TrimtabError
    from trimtab.passes.profile import Profile

    try:
        from trimtab.training.recover import Settings, check_recipe, recover
    except ModuleNotFoundError as error:
        raise TrimtabError(f"training needs {error.name}", hint="pip install 'trimtab[train]'") from error

    plan, dataset = load_recipe(recipe), read_data(data)
    check_recipe(plan)
    if not out.absolute().parent.is_dir():
        raise ProfileError(f"{out.absolute().parent}: no such folder", hint="make it first")
    given = Profile.load(profile) if profile is not None else None
    source = open_source(model, allow_pickle=allow_pickle)
    settings = Settings(
        minutes=minutes, steps=steps, lr=lr, batch_size=batch_size, max_tokens=max_tokens, seed=seed, train=train.value,
        labels_weight=labels_weight,
    )  # fmt: skip
    with console.progress() as progress:
        if given is None:
            given = measured_profile(source, dataset, plan.calibration, progress=progress)
        given.check(source.fingerprint)
        capability = get_target(plan.target).probe()
        learned = recover(source, plan, dataset, given, settings, capability=capability, progress=progress)
    learned.save(out)
    record: dict[str, Any] = {key: v for key, v in learned.info.learned[method.value].items() if key != "from"}
    if json:
        console.emit_json(record)
    else:
        rows = [(row["step"], f"{row['loss']:.5f}", f"{row['agreement']:.4f}") for row in record["history"]]
        console.print_table(("step", "loss", "agreement"), rows)
        print(f"\nkept the best of these, in {out}")
