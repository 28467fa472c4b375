"""Messages for values that a schema refuses: the path of each fault, the expected value, and the actual one."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from trimtab.passes.errors import RecipeError, short


class _Dumper(yaml.SafeDumper):
    """SafeDumper that writes `nan` for `.nan`, and repeats a shared list instead of an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_float(self, data: float) -> yaml.ScalarNode:
        return super().represent_float(data) if math.isfinite(data) else self.represent_str(str(data))


_Dumper.add_representer(float, _Dumper.represent_float)

_MAX_LISTED = 10  # faults in a message

_EXPECTED = {
    "dict_type": "should be a mapping", "model_type": "should be a mapping",
    "model_attributes_type": "should be a mapping", "list_type": "should be a list", "tuple_type": "should be a list",
}  # fmt: skip
"""Our texts for those kinds of pydantic faults whose messages name Python types."""


def explain(error: ValidationError, model: type[BaseModel], *, where: str = "") -> RecipeError:
    """The error for options that `model` refused, with the path of each fault.

    Args:
        where: path of the options ("passes[1].ffn-split").
    """
    faults: dict[str, str] = {}
    reported = error.errors(include_url=False)
    parents = {fault["loc"][:-1] for fault in reported}
    for fault in reported:
        loc = fault["loc"]
        if fault["type"] == "too_short" and loc in parents:
            continue  # pydantic does not count items that have faults themselves
        path = dotted(where, loc)
        if fault["type"] == "extra_forbidden":
            names = list(_names(model, [str(part) for part in loc[:-1]]))
            faults[path] = f"unknown key; {suggest(str(loc[-1]), names, 'keys here')}"
        else:
            # A union reports one fault for each of its members, whose names end the path.
            faults.setdefault(path, _reason(fault))
    lines = [f"{short(path, 200)}: {text}" for path, text in list(faults.items())[:_MAX_LISTED]]
    if len(faults) == 1:
        return RecipeError(lines[0])
    more = [f"and {len(faults) - _MAX_LISTED} more"] if len(faults) > _MAX_LISTED else []
    return RecipeError("\n  ".join([f"{len(faults)} faults", *lines, *more]))


def _reason(fault: Any) -> str:
    """The expected value and the actual one; for options that conflict, only the reason."""
    kind, value = fault["type"], fault["input"]
    text = fault["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if kind == "missing" or (kind == "value_error" and isinstance(value, Mapping | BaseModel)):
        return str(text)
    if kind in ("too_short", "too_long"):
        word, count = (
            ("least", fault["ctx"]["min_length"]) if kind == "too_short" else ("most", fault["ctx"]["max_length"])
        )
        text = f"should have at {word} {count} item{'s' * (count != 1)}"
    return f"{_EXPECTED.get(kind, text)}, not {shown(value)}"


def shown(value: Any) -> str:
    """`value` in YAML, on one line and shortened; NaN as `nan`, a value that YAML cannot express as in Python."""
    try:
        text = yaml.dump(
            value, Dumper=_Dumper, default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False
        ).removesuffix("\n...\n")
    except yaml.YAMLError:
        text = repr(value)
    return short(" ".join(text.split()))


def suggest(wrong: str, names: Sequence[str], what: str) -> str:
    """A question that suggests the nearest of `names`, or else the list of all names."""
    near = difflib.get_close_matches(short(wrong), names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"{what}: {', '.join(names) or 'none'}"


def dotted(where: str, loc: Sequence[int | str]) -> str:
    """("workload", "batch", 0) → "workload.batch[0]"."""
    for part in loc:
        where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else part
    return where


def _names(model: type[BaseModel], loc: list[str]) -> Iterator[str]:
    """The valid keys of `model` at `loc`, through unions, lists and optional fields."""
    models: list[type[BaseModel]] = [model]
    for part in loc:
        fields = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        # A part that is not a field is a position in a list or a member of a union: the models stay the same.
        models = [inner for annotation in fields for inner in _models(annotation)] if fields else models
    for each in models:
        yield from each.model_fields


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)
