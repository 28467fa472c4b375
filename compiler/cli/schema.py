"""Options of pydantic models for the reader of a terminal: rows of a table, from their JSON schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from trimtab.compiler.cli import console

Schema = Mapping[str, Any]
Row = tuple[str, str, str, str]

_PLURALS = {"integer": "integers", "number": "numbers", "string": "names", "boolean": "booleans"}


def print_options(model: type[BaseModel], *, spelled: Callable[[str], str] = str) -> None:
    """Print a table of the fields of `model`; those of a nested model follow their own field as "field.key".

    Args:
        spelled: the name of a field → as its user writes it.
    """
    rows = [(spelled(name), *row) for name, *row in option_rows(model)]
    if rows:
        console.print_table(("option", "values", "default", "meaning"), rows)
    else:
        print("no options")


def option_rows(model: type[BaseModel]) -> Iterator[Row]:
    """(option, values, default, meaning) of each field of `model`, and of each key of the models in it."""
    schema = model.model_json_schema()
    yield from _rows(schema, schema.get("$defs", {}), "")


def _rows(schema: Schema, definitions: Schema, prefix: str) -> Iterator[Row]:
    for key, option in schema.get("properties", {}).items():
        name = f"{prefix}{key}"
        yield name, _values(option, definitions), _default(option), option.get("description", "")
        for each in _alternatives(option, definitions):
            yield from _rows(each, definitions, f"{name}.")


def _alternatives(option: Schema, definitions: Schema) -> list[Schema]:
    """What the value of an option may be, with references resolved."""
    if "$ref" in option:
        return [definitions[option["$ref"].rsplit("/", 1)[-1]]]
    alternatives = option.get("anyOf", option.get("oneOf"))
    if alternatives is None:
        return [option]
    return [resolved for each in alternatives for resolved in _alternatives(each, definitions)]


def _values(option: Schema, definitions: Schema) -> str:
    """The values that an option takes: "int8|int4", "number 0<x<=1", "list of integers", "mapping|null", ..."""
    return "|".join(_one(each, definitions) for each in _alternatives(option, definitions))


def _one(option: Schema, definitions: Schema) -> str:
    if "enum" in option:
        return "|".join(map(str, option["enum"]))
    if "const" in option:
        return str(option["const"])
    kind = option.get("type", "any")
    if kind == "array":
        items = option.get("prefixItems")
        if items:
            return f"[{', '.join(_values(each, definitions) for each in items)}]"
        inner = _values(option.get("items", {}), definitions)
        return f"list of {_PLURALS.get(inner, inner)}"
    if kind == "object":
        values = option.get("additionalProperties")
        return f"mapping of names to {_values(values, definitions)}" if values else "mapping"
    multiple = f"multiple of {option['multipleOf']}" if "multipleOf" in option else ""
    return " ".join(filter(None, (str(kind), _bounds(option), multiple)))


def _bounds(option: Schema) -> str:
    """The interval as typer writes it in help texts: "0<=x<1", "x>0"; "" where there is none."""
    low = _first(option, {"minimum": "<=", "exclusiveMinimum": "<"})
    high = _first(option, {"maximum": "<=", "exclusiveMaximum": "<"})
    if low and high:
        return f"{low[0]:g}{low[1]}x{high[1]}{high[0]:g}"
    if low:
        return f"x{low[1].replace('<', '>')}{low[0]:g}"
    return f"x{high[1]}{high[0]:g}" if high else ""


def _first(option: Schema, keys: Mapping[str, str]) -> tuple[float, str] | None:
    return next(((option[key], sign) for key, sign in keys.items() if key in option), None)


def _default(option: Schema) -> str:
    """The default as a recipe writes it."""
    if "default" not in option:
        return "(required)"
    default = option["default"]
    return default if isinstance(default, str) else json.dumps(default)
