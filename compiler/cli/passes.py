"""`trimtab passes`: what a recipe can ask for."""

from __future__ import annotations

from typing import Annotated

import typer

from trimtab.compiler.cli import console, options
from trimtab.compiler.cli.schema import print_options


def command(
    name: Annotated[
        str | None, typer.Argument(help="Pass whose options are listed. Default: list the passes.", show_default=False)
    ] = None,
    json: options.Json = False,
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
                    "needs_profile": bool(each.needs),
                    "options": each.model_json_schema(),
                }
                for each in chosen
            ]
        )
    elif name:
        print(f"{name}: {chosen[0].summary}\n")
        print_options(chosen[0])
    else:
        rows = [(each.name, "yes" if each.needs else "no", each.summary) for each in chosen]
        console.print_table(("pass", "needs profile", "what it does"), rows)
