"""The typer application. Commands are loaded when they are called, so that a command's imports burden no other.

A command is a module of this package that defines one function `command`, plain, with typer annotations:

    def command(
        model: options.Model,
        tokens: Annotated[int, typer.Option(min=1, help="Sequence length, in tokens.")] = 128,
        json: options.Json = False,
    ) -> None:
        \"\"\"One line for its --help; more paragraphs may follow.\"\"\"

It is listed in `COMMANDS` below; options that several commands share are in options.py. It need not catch errors:
`console.reporting_errors` reports whatever it raises. It writes results to stdout (`console.emit_json` under --json),
and all else to stderr (`console.progress`, `logging`).
"""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from trimtab.compiler.cli import console
from trimtab.compiler.cli.renamed import with_new_names

COMMANDS = {
    "inspect": "Show the parts of a model and what each of them costs.",
    "calibrate": "Measure a model on data and write its Profile.",
    "train": "Learn weights that a pass needs: a Profile or a new model.",
    "compile": "Compile a model into a build directory.",
    "validate": "Compare a build with its dense model: numbers and task quality.",
    "generate": "Generate text with a build of a causal language model.",
    "package": "Write a build in the format of another program.",
    "serve": "Serve a build with Triton Inference Server.",
    "bench": "Time a build beside its dense model in one run.",
    "cost": "Measure FLOPs, quality and time of a build at each speed.",
    "passes": "List the passes and their options.",
    "methods": "List the methods of `trimtab train` and their options.",
    "targets": "List the targets and whether they work here.",
}
"""Command → its line in `trimtab --help`. The module of the same name defines it."""


def load(name: str) -> Any:
    """The command `name`, imported now."""
    with console.reporting_errors():
        function = import_module(f"trimtab.compiler.cli.{name}").command
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name)(console.reporting_errors()(function))
    return typer.main.get_command(single)


class LazyGroup(TyperGroup):
    """Knows every command by its one line of help, and imports the one that is called."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        for name, summary in COMMANDS.items():
            self.add_command(TyperCommand(name, help=summary))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] in COMMANDS:
            self.commands[args[0]] = load(args[0])
            args[1:] = with_new_names(args[0], args[1:])
            if "--json" in args:
                ctx.with_resource(console.stdout_for_json())
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"trimtab {version('trimtab')}")
        raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what each step does.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Log more, and print the traceback of an error.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compile a dense transformer into an engine that does less work per token."""
    console.set_up_logging(logging.DEBUG if debug else logging.INFO if verbose else logging.WARNING)
