"""Settings of training methods as options of a command: derived from their models, with bounds, defaults and help."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trimtab.passes.errors import RecipeError


def flag(name: str) -> str:
    """`batch_size` → "--batch-size"."""
    return "--" + name.replace("_", "-")


def parameters(methods: Mapping[str, type[BaseModel]]) -> Iterator[inspect.Parameter]:
    """One optional keyword of typer's for each setting of any method; None where it is not given.

    Help names the methods that have the setting, unless all have it; and each method's default where they differ.

    Args:
        methods: name → model of its settings. A setting of several methods has the same type in all of them.
    """
    names = dict.fromkeys(key for model in methods.values() for key in model.model_fields)
    for name in names:
        having = {method: model.model_fields[name] for method, model in methods.items() if name in model.model_fields}
        field = next(iter(having.values()))
        of = "" if len(having) == len(methods) else f"{', '.join(having)}: "
        defaults = {method: each.default for method, each in having.items()}
        names_of = f"{flag(name)}/{flag(f'no-{name}')}" if field.annotation is bool else flag(name)
        option = typer.Option(
            names_of,
            help=" ".join(filter(None, (f"{of}{field.description}", _shown(defaults), _open(field)))),
            show_default=False,
            **_bounds(field),
        )
        annotation = Annotated[_kind(name, field.annotation) | None, option]  # type: ignore[valid-type]
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def chosen(method: str, given: Mapping[str, Any], methods: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """The settings of `method` that were given.

    Raises:
        RecipeError: one that belongs to other methods alone.
    """
    settings = {key: value.value if isinstance(value, Enum) else value for key, value in given.items()}
    settings = {key: value for key, value in settings.items() if value is not None}
    for key in settings:
        if key not in methods[method].model_fields:
            others = [name for name, model in methods.items() if key in model.model_fields]
            raise RecipeError(
                f"{flag(key)} belongs to --method {' or '.join(others)}, and not to {method}",
                hint=f"leave it out; `trimtab methods {method}` lists the options of {method}",
            )
    return settings


def _kind(name: str, annotation: Any) -> Any:
    """The type that typer reads: that of the field, without None; an enumeration of literals."""
    inner = [each for each in get_args(annotation) if each is not type(None)]
    if type(None) in get_args(annotation):
        (annotation,) = inner
    if get_origin(annotation) is Literal:
        return Enum(name, {str(value): value for value in get_args(annotation)}, type=str)
    return annotation


def _bounds(field: FieldInfo) -> dict[str, Any]:
    """`min` and `max` of typer; bounds that are excluded are left to the model."""
    low = next((each.ge for each in field.metadata if hasattr(each, "ge")), None)
    high = next((each.le for each in field.metadata if hasattr(each, "le")), None)
    return {key: value for key, value in (("min", low), ("max", high)) if value is not None}


def _open(field: FieldInfo) -> str:
    """The bounds that are excluded, which typer cannot show."""
    low = [f"x>{each.gt:g}" for each in field.metadata if hasattr(each, "gt")]
    high = [f"x<{each.lt:g}" for each in field.metadata if hasattr(each, "lt")]
    return f"[{', '.join(low + high)}]" if low or high else ""


def _shown(defaults: Mapping[str, Any]) -> str:
    """The default; of each method where they differ."""
    known = {method: _text(value) for method, value in defaults.items()}
    if len(set(known.values())) > 1:
        return f"Default: {', '.join(f'{method} {value}' for method, value in known.items())}."
    (value,) = set(known.values())
    return "" if value is None else f"Default: {value}."


def _text(value: Any) -> Any:
    """As the command line has it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else value
