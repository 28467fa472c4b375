"""Options of pydantic models for the reader of a terminal: rows of a table, from their JSON schema."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from trimtab.compiler.cli import console


def print_options(model: type[BaseModel]) -> None:
    """Print a table of the fields of `model`."""
    properties = model.model_json_schema().get("properties", {})
    rows = [(key, _kind(o), _default(o), o.get("description", "")) for key, o in properties.items()]
    console.print_table(("option", "values", "default", "meaning"), rows)


def _kind(option: dict[str, Any]) -> str:
    """The values an option takes, from its JSON schema: "int8|int4", "number 0..1", ..."""
    if "anyOf" in option:
        return "|".join(_kind(each) for each in option["anyOf"])
    if "enum" in option:
        return "|".join(str(each) for each in option["enum"])
    if "$ref" in option:
        return str(option["$ref"].rsplit("/", 1)[-1])
    low = option.get("minimum", option.get("exclusiveMinimum"))
    high = option.get("maximum", option.get("exclusiveMaximum"))
    bounds = f" {low if low is not None else ''}..{high if high is not None else ''}"
    return str(option.get("const", option.get("type", "any"))) + (bounds if bounds != " .." else "")


def _default(option: dict[str, Any]) -> str:
    return str(option["default"]) if "default" in option else "(required)"
