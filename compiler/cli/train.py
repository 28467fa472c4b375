"""`trimtab train`: learn what a pass needs, and keep it in a Profile or a new model."""

from __future__ import annotations

import math
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.compiler.cli import console

if TYPE_CHECKING:
    from trimtab.compiler.data import Dataset
    from trimtab.compiler.recipe import Recipe

_PERPLEXITIES = {"dense": "dense", "before": "with the top-k before training", "after": "after"}


class Method(str, Enum):
    recover = "recover"
    topk = "topk"


class Train(str, Enum):
    all = "all"
    ffn = "ffn"


def command(
    model: Annotated[str, typer.Argument(help="Hugging Face directory or ONNX file.", show_default=False)],
    data: Annotated[Path, typer.Option(help="Data to learn from; not what you will judge by.", show_default=False)],
    out: Annotated[
        Path, typer.Option("--output", "-o", help="The Profile to write; of topk, the model.", show_default=False)
    ],
    recipe: Annotated[Path, typer.Option(help="The recipe the model will be compiled with.", show_default=False)],
    method: Annotated[Method, typer.Option(help="What to learn.")] = Method.recover,
    profile: Annotated[Path | None, typer.Option(help="recover: Profile to add to; else measured on the data.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="pass.option=value, as for compile; may be repeated.", show_default=False),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0, help="Time limit, which the learning rate follows.")] = 10.0,
    steps: Annotated[
        int | None, typer.Option(min=0, help="Follow a number of steps instead, repeatably.", show_default=False)
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(min=0, help="Highest learning rate: 5e-5, of topk 5e-4.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="Texts are cut there, or into blocks of so many.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of samples.")] = 0,
    train: Annotated[Train, typer.Option(help="recover: all but embeddings, or the FFNs alone.")] = Train.all,
    labels_weight: Annotated[
        float, typer.Option(min=0, help="recover: of the data's labels in the loss, beside the dense model's outputs.")
    ] = 0.0,
    allow_pickle: Annotated[bool, typer.Option(help="Read pickled weights: they can run code.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Learn what a pass needs: weights that go into a Profile, or a model that it suits.

    recover: a short distillation of the model that the recipe's passes make from the dense one. Passes behind `recover`
    in the recipe are not run while learning, but it learns with the rounding that they bring.

    topk: fine-tunes a Hugging Face model to do with the neurons that the recipe's `ffn-topk` wants of each token, and
    writes a new model, to be compiled with the same recipe.
    """
    from trimtab.compiler.data import read_data
    from trimtab.compiler.learned import remedies
    from trimtab.compiler.recipe import load_recipe, override
    from trimtab.passes.errors import RecipeError, TrimtabError

    common: dict[str, Any] = {
        "minutes": minutes, "steps": steps, "batch_size": batch_size, "max_tokens": max_tokens, "seed": seed,
    }  # fmt: skip
    if lr is not None:
        common["lr"] = lr
    plan, dataset = override(load_recipe(recipe), settings or []), read_data(data)
    try:
        if method is Method.topk:
            if profile is not None or train is not Train.all or labels_weight:
                raise RecipeError("--profile, --train and --labels-weight belong to --method recover")
            record = _topk(model, plan, dataset, common, out, allow_pickle)
            if record is None:
                return  # another process of the same training tells
        else:
            chosen = common | {"train": train.value, "labels_weight": labels_weight}
            with remedies(model=model, recipe=recipe, settings=settings or (), data=data, profile=profile):
                record = _recover(model, plan, dataset, chosen, out, profile, allow_pickle)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("trimtab"):
            raise
        raise TrimtabError(f"training needs {error.name}", hint="pip install 'trimtab[train]'") from error
    if json:
        console.emit_json(record)
        return
    keys = [key for key in record["history"][0] if key != "step"]
    rows = [(row["step"], *(f"{row[key]:.4f}" for key in keys)) for row in record["history"]]
    console.print_table(("step", *keys), rows)
    if method is Method.topk:
        told = ", ".join(f"{math.exp(record['losses'][key]):.3f} {what}" for key, what in _PERPLEXITIES.items())
        print(f"\nperplexity on held-out samples: {told}; the model is in {out}")
    else:
        print(f"\nkept the best of these, in {out}")


def _topk(
    model: str, plan: Recipe, dataset: Dataset, settings: dict[str, Any], out: Path, allow_pickle: bool
) -> dict[str, Any] | None:
    from trimtab.training.topk.finetune import finetune
    from trimtab.training.topk.settings import Settings

    with console.progress() as progress:
        return finetune(
            Path(model), plan, dataset, Settings(**settings), out, allow_pickle=allow_pickle, progress=progress
        )


def _recover(
    model: str, plan: Recipe, dataset: Dataset, settings: dict[str, Any], out: Path, profile: Path | None,
    allow_pickle: bool,
) -> dict[str, Any]:  # fmt: skip
    from trimtab.compiler.pipeline import check_fit
    from trimtab.compiler.profiling import measured_profile
    from trimtab.compiler.sources import open_source
    from trimtab.compiler.targets import get_target
    from trimtab.passes.contract import check_learned
    from trimtab.passes.errors import ProfileError
    from trimtab.passes.profile import Profile
    from trimtab.training.recover import Settings, check_recipe, recover

    place = check_recipe(plan)
    if not out.absolute().parent.is_dir():
        raise ProfileError(f"{out.absolute().parent}: no such folder", hint="make it first")
    given = Profile.load(profile) if profile is not None else None
    check_learned(plan.passes[:place], given)
    capability = get_target(plan.target).probe()
    check_fit(plan, capability)  # or it could not be compiled with what it learned
    source = open_source(model, allow_pickle=allow_pickle)
    with console.progress() as progress:
        if given is None:
            given = measured_profile(source, dataset, plan.calibration, progress=progress)
        given.check(source.fingerprint)
        learned = recover(source, plan, dataset, given, Settings(**settings), capability=capability, progress=progress)
    learned.save(out)
    return {key: value for key, value in learned.info.learned["recover"].items() if key != "from"}
