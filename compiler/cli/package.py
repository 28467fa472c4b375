"""`trimtab package`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.compiler.builds.build import open_build
from trimtab.compiler.cli import console, options


def command(
    build: options.BuildFolder,
    genai: Annotated[
        Path | None, typer.Option(help="Folder to write, for ONNX Runtime GenAI.", show_default=False)
    ] = None,
    triton: Annotated[
        Path | None, typer.Option(help="Model repository to write, for Triton Inference Server.", show_default=False)
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in Triton. Default: the name of the build directory.")
    ] = None,
    backend: options.Backend = "auto",
    max_batch: options.MaxBatch = None,
    gpu: Annotated[
        bool | None,
        typer.Option(
            "--gpu/--cpu", help="Processor that Triton runs the engine on. Default: GPU for tensorrt, else CPU."
        ),
    ] = None,
    mounted_at: Annotated[
        str | None, typer.Option(help="Path of the repository on the server, such as /models in a container.")
    ] = None,
    environment: Annotated[
        str | None,
        typer.Option(help="Python environment of Triton's Python models (EXECUTION_ENV_PATH): archive or folder."),
    ] = None,
    trusted_hash: options.TrustedHash = None,
    json: options.Json = False,
) -> None:
    """Write a build in the format of another program: --genai or --triton."""
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
    package = package_triton(
        opened, triton, name=name, backend=backend, batch=max_batch, gpu=gpu, mounted_at=mounted_at,
        environment=environment,
    )  # fmt: skip
    if json:
        console.emit_json({"triton": str(package.path), "models": list(package.models), "backend": package.backend})
        return
    print(f"{package.path}: models {', '.join(package.models)} (backend {package.backend})")
    if package.why:
        print(f"no text model: {package.why}")
    print(f"tritonserver --model-repository={mounted_at or package.path} --disable-auto-complete-config")
