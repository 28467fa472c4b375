"""`trimtab package`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.compiler.builds.build import open_build
from trimtab.compiler.cli import console
from trimtab.compiler.packaging.genai import package_genai


def command(
    build: Annotated[Path, typer.Argument(help="Build directory.", show_default=False)],
    genai: Annotated[Path, typer.Option(help="Folder to write for ONNX Runtime GenAI.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Write a build in the shape that another program expects."""
    out = package_genai(open_build(build), genai)
    if json:
        console.emit_json({"genai": str(out)})
    else:
        print(f"{out}: ready for onnxruntime-genai")
