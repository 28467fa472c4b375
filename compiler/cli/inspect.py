"""`trimtab inspect`: what a model consists of."""

from __future__ import annotations

from typing import Annotated

import typer

from trimtab.compiler.cli import console, options


def command(
    model: options.Model,
    json: options.Json = False,
    tokens: Annotated[int, typer.Option(min=1, help="Sequence length, in tokens, for the cost of attention.")] = 128,
    allow_pickle: options.AllowPickle = False,
) -> None:
    """Show the parts of a model and what each of them costs.

    Only the structure is read: weights are not loaded. Each part that was not recognised is listed with its node and
    the reason.
    """
    from trimtab.compiler import inspect
    from trimtab.compiler.sources import open_source
    from trimtab.passes.anatomy import find_anatomy

    report = inspect.describe(find_anatomy(open_source(model, allow_pickle=allow_pickle).graph()), tokens=tokens)
    if json:
        console.emit_json(report)
        return
    print(inspect.summary(report) + "\n")
    headers = ("part", "M parameters", f"MFLOPs per token (at {tokens})", "MB read per token")
    console.print_table(headers, inspect.cost_rows(report))
    print()
    for line in inspect.gain_lines(report):
        print(line)
    for each in report["unrecognized"]:
        print(f"not recognised: {each['what']} at node {each['where']}: {each['why']}")
