"""`trimtab passes`: what a recipe can ask for."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from trimtab.compiler.cli import console


def command(
    name: Annotated[str | None, typer.Argument(help="Show the options of this pass.", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """List the passes and their options."""
    from trimtab.passes import PASS_NAMES, pass_class

    chosen = [pass_class(each) for each in ([name] if name else PASS_NAMES)]
    if json:
        console.emit_json(
            [
                {
                    "name": each.name,
                    "summary": each.summary,
                    "needs_profile": each.needs_profile,
                    "options": each.model_json_schema(),
                }
                for each in chosen
            ]
        )
    elif name:
        print(f"{name}: {chosen[0].summary}\n")
        properties = chosen[0].model_json_schema().get("properties", {})
        options = [(key, _kind(o), _default(o), o.get("description", "")) for key, o in properties.items()]
        console.print_table(("option", "values", "default", "meaning"), options)
    else:
        rows = [(each.name, "yes" if each.needs_profile else "no", each.summary) for each in chosen]
        console.print_table(("pass", "needs profile", "what it does"), rows)


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
