"""`trimtab methods`: what `trimtab train` can learn."""

from __future__ import annotations

from typing import Annotated

import typer

from trimtab.compiler.cli import console, options
from trimtab.compiler.cli.schema import print_options
from trimtab.compiler.cli.settings import flag


def command(
    name: Annotated[
        str | None,
        typer.Argument(help="Method whose options are listed. Default: list the methods.", show_default=False),
    ] = None,
    json: options.Json = False,
) -> None:
    """List the methods of `trimtab train` and their options."""
    from trimtab.training import METHOD_NAMES, trainer_class

    chosen = [trainer_class(each) for each in ([name] if name else METHOD_NAMES)]
    if json:
        console.emit_json(
            [
                {
                    "name": each.name, "summary": each.summary, "makes": each.makes, "needs": sorted(each.needs),
                    "options": each.settings_class.model_json_schema(),
                }
                for each in chosen
            ]
        )  # fmt: skip
    elif name:
        (method,) = chosen
        print(f"{name}: {method.summary}\nneeds {', '.join(sorted(method.needs))}; makes a {method.makes}\n")
        print_options(method.settings_class, spelled=flag)
    else:
        rows = [(each.name, each.makes, ", ".join(sorted(each.needs)), each.summary) for each in chosen]
        console.print_table(("method", "makes", "needs", "what it does"), rows)
