"""`trimtab package`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.compiler.builds.build import open_build
from trimtab.compiler.cli import console

BACKEND_HELP = "Triton backend that runs the build: auto, onnxruntime, python (ONNX Runtime in it) or tensorrt."
BATCH_HELP = "Samples that Triton joins in one call, at most. Default: the most that the workload declares."


def command(
    build: Annotated[Path, typer.Argument(help="Build directory.", show_default=False)],
    genai: Annotated[
        Path | None, typer.Option(help="Folder to write for ONNX Runtime GenAI.", show_default=False)
    ] = None,
    triton: Annotated[
        Path | None, typer.Option(help="Model repository to write for Triton Inference Server.", show_default=False)
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in Triton. Default: that of the build's folder.")
    ] = None,
    backend: Annotated[str, typer.Option(help=BACKEND_HELP)] = "auto",
    max_batch: Annotated[int | None, typer.Option(min=1, help=BATCH_HELP)] = None,
    gpu: Annotated[
        bool | None, typer.Option("--gpu/--cpu", help="Where Triton runs the engine. Default: tensorrt on the GPU.")
    ] = None,
    mounted_at: Annotated[
        str | None, typer.Option(help="Where the server will see the repository, such as /models in a container.")
    ] = None,
    environment: Annotated[
        str | None, typer.Option(help="EXECUTION_ENV_PATH of Triton's Python models: an archive or a folder.")
    ] = None,
    trusted_hash: Annotated[str | None, typer.Option(help=console.TRUSTED_HELP, show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Write a build in the shape that another program expects: give one of --genai and --triton."""
    if (genai is None) == (triton is None):
        raise typer.BadParameter("give one of --genai and --triton")
    opened = open_build(build, trusted_hash=trusted_hash)
    if genai is not None:
        from trimtab.compiler.packaging.genai import package_genai

        out = package_genai(opened, genai)
        if json:
            console.emit_json({"genai": str(out)})
        else:
            print(f"{out}: ready for onnxruntime-genai")
        return
    from trimtab.compiler.packaging.triton import package_triton

    assert triton is not None
    made = package_triton(
        opened, triton, name=name, backend=backend, batch=max_batch, gpu=gpu, mounted_at=mounted_at,
        environment=environment,
    )  # fmt: skip
    if json:
        console.emit_json({"triton": str(made.path), "models": list(made.models), "backend": made.backend})
        return
    print(f"{made.path}: models {', '.join(made.models)} (backend {made.backend})")
    if made.why:
        print(f"no text model: {made.why}")
    print(f"tritonserver --model-repository={mounted_at or made.path} --disable-auto-complete-config")
