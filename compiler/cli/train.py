"""`trimtab train`: learn what a pass needs, and keep it in a Profile or a new model."""

from __future__ import annotations

import inspect
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.compiler.cli import console, options
from trimtab.compiler.cli.settings import chosen, parameters
from trimtab.training import METHOD_NAMES, trainer_class

_TRAINERS = {name: trainer_class(name) for name in METHOD_NAMES}
_SETTINGS = {name: trainer.settings_class for name, trainer in _TRAINERS.items()}
_NO_PROFILE = ", ".join(name for name, trainer in _TRAINERS.items() if "profile" not in trainer.needs)

Method = Enum("Method", {name: name for name in METHOD_NAMES}, type=str)  # type: ignore[misc]
_FIRST = Method(METHOD_NAMES[0])


def command(
    model: options.Model,
    data: Annotated[
        Path, typer.Option(help="Training data, apart from the data that you will validate on.", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Option("--output", "-o", help="Profile (.safetensors) or model folder to write.", show_default=False),
    ],
    method: Annotated[Method, typer.Option(help="Method; `trimtab methods` describes them.")] = _FIRST,
    recipe: Annotated[
        Path | None,
        typer.Argument(help="Recipe (YAML) that the model will be compiled with.", show_default=False),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help=f"Profile to extend. Default: one is measured on the data. Not for {_NO_PROFILE}."),
    ] = None,
    changes: options.RecipeChanges = None,
    allow_pickle: options.AllowPickle = False,
    json: options.Json = False,
    **settings: Any,
) -> None:
    from trimtab.training.run import train

    with console.progress() as progress:
        trained = train(
            method.value, model, data, out, recipe=recipe, changes=changes or [], profile=profile,
            settings=chosen(method.value, settings, _SETTINGS), allow_pickle=allow_pickle, progress=progress,
        )  # fmt: skip
    if trained is None:
        return  # another process of the same training tells
    if json:
        console.emit_json(trained.record)
        return
    history = trained.record["history"]
    keys = dict.fromkeys(key for row in history for key in ("step", *row))
    console.print_table(tuple(keys), [tuple(_cell(row.get(key, "")) for key in keys) for row in history])
    print(f"\n{trained.summary}")


def _cell(value: Any) -> Any:
    """A number, or one for each layer, as the table shows it."""
    if isinstance(value, list):
        return " ".join(f"{each:.2f}" for each in value)
    return f"{value:.4f}" if isinstance(value, float) else value


def _help() -> str:
    methods = (f"{name}: {trainer.summary}\nMakes a {trainer.makes}." for name, trainer in _TRAINERS.items())
    first = "Learn weights that a pass needs: a Profile, or a new model."
    return "\n\n".join([first, *methods])


def _signature() -> inspect.Signature:
    """That of `command`, with an option for each setting of any method."""
    *fixed, _ = inspect.signature(command, eval_str=True).parameters.values()
    return inspect.Signature([*fixed, *parameters(_SETTINGS)])


command.__doc__ = _help()
command.__signature__ = _signature()  # type: ignore[attr-defined]
