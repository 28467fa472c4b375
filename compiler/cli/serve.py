"""`trimtab serve`."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.compiler.builds.build import open_build
from trimtab.compiler.cli import console
from trimtab.compiler.cli.package import BACKEND_HELP, BATCH_HELP


def command(
    build: Annotated[Path, typer.Argument(help="Build directory.", show_default=False)],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of HTTP; 0 takes any that is free.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="Of gRPC; 0 takes any.")] = 8001,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="Of the metrics; 0 takes any.")] = 8002,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Whoever reaches it may use the server.")
    ] = "127.0.0.1",
    name: Annotated[str | None, typer.Option(help="Of the model. Default: that of the build's folder.")] = None,
    backend: Annotated[str, typer.Option(help=BACKEND_HELP)] = "auto",
    max_batch: Annotated[int | None, typer.Option(min=1, help=BATCH_HELP)] = None,
    repository: Annotated[
        Path | None, typer.Option(help="Write the model repository there, and keep it.", show_default="temporary")
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="Write the server's log there, and keep it.", show_default="temporary")
    ] = None,
    start_timeout: Annotated[float, typer.Option(min=1, help="Seconds that loading may take.")] = 120.0,
    trusted_hash: Annotated[str | None, typer.Option(help=console.TRUSTED_HELP, show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON alone, once the server answers.")] = False,
) -> None:
    """Serve a build with Triton Inference Server, until Ctrl-C.

    The server is $TRIMTAB_TRITONSERVER, else `tritonserver` on PATH, else one that trimtab installs once into its cache
    (from PyPI; CPU only; some 400 MB).
    """
    from trimtab.compiler.serving import Ports, serve_build

    start = time.perf_counter()
    signal.signal(signal.SIGTERM, _interrupt)
    opened = open_build(build, trusted_hash=trusted_hash)
    try:
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trimtab-serve-")))
            report = stack.enter_context(console.progress())
            serving = stack.enter_context(
                serve_build(
                    opened, repository or scratch / "repository", log or scratch / "server.log", host=host,
                    ports=Ports(port, grpc_port, metrics_port), name=name, backend=backend, batch=max_batch,
                    start_s=start_timeout, progress=report,
                )
            )  # fmt: skip
            _show(serving, time.perf_counter() - start, json)
            serving.server.wait()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)


def _interrupt(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def _show(serving: Any, seconds: float, json: bool) -> None:
    from trimtab.compiler.serving.process import in_url

    server, package, example = serving.server, serving.package, serving.example
    host = in_url(server.host)
    urls = {
        "http": server.url, "grpc": f"{host}:{server.ports.grpc}",
        "metrics": f"http://{host}:{server.ports.metrics}/metrics", "log": str(server.log),
    }  # fmt: skip
    if json:
        told = {
            "models": list(package.models),
            "backend": package.backend,
            "seconds": seconds,
            "pid": server.process.pid,
        }
        console.emit_json(urls | told | asdict(example))
        return
    print(f"{', '.join(package.models)}: ready after {seconds:.1f} s (backend {package.backend})")
    for key, url in urls.items():
        print(f"  {key:8} {url}")
    if package.why:
        print(f"  no text model: {package.why}")
    print(f"\n$ {example.curl}\n{example.answer}\n\nCtrl-C stops it.", flush=True)
