"""`trimtab inspect`: what a model consists of."""

from __future__ import annotations

from typing import Annotated

import typer

from trimtab.compiler.cli import console


def command(
    model: Annotated[str, typer.Argument(help="Hugging Face directory, GGUF or ONNX file.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Sequence length at which attention is counted.")] = 128,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickled weights; they can run code.")
    ] = False,
) -> None:
    """Show what a model consists of, and where it spends its work.

    Reads structure alone: weights are not loaded. What was not recognised is named, with the node and the reason.
    """
    from trimtab.compiler import inspect
    from trimtab.compiler.sources import open_source
    from trimtab.passes.anatomy import find_anatomy

    found = inspect.describe(find_anatomy(open_source(model, allow_pickle=allow_pickle).graph()), tokens=tokens)
    if json:
        console.emit_json(found)
        return
    print(inspect.summary(found) + "\n")
    headers = ("part", "M parameters", f"MFLOPs per token (at {tokens})", "MB read per token")
    console.print_table(headers, inspect.cost_rows(found))
    print()
    for line in inspect.gain_lines(found):
        print(line)
    for each in found["unrecognized"]:
        print(f"not recognised: {each['what']} at node {each['where']}: {each['why']}")
