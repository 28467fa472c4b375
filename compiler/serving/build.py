"""Serving a build: package it for the available server, start the server, and send one request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trimtab.compiler.builds.build import Build
from trimtab.compiler.packaging.triton import Package, check_backend, check_package, package_triton
from trimtab.compiler.progress import Progress
from trimtab.compiler.serving.example import Example, first_answer
from trimtab.compiler.serving.find import TritonServer, find_server
from trimtab.compiler.serving.process import Ports, Served, choose_ports, serve
from trimtab.passes.errors import InputError, TargetError
from trimtab.passes.os_errors import reason, remedy
from trimtab.plugins.driver import gpu_present

_CONTAINER = "run NVIDIA's container on the repository that `trimtab package --triton` writes"


@dataclass(frozen=True)
class Serving:
    """A served build.

    Attributes:
        server: the running server.
        package: the repository that it serves.
        example: a request that it answered.
    """

    server: Served
    package: Package
    example: Example


@contextmanager
def serve_build(
    build: Build,
    repository: Path,
    log: Path,
    *,
    host: str = "127.0.0.1",
    ports: Ports | None = None,
    name: str | None = None,
    backend: str = "auto",
    batch: int | None = None,
    start_s: float = 120.0,
    progress: Progress | None = None,
) -> Iterator[Serving]:
    """Serve `build` while the body runs.

    Args:
        repository: folder to write for the server; it must not exist, and is not removed.
        log: file for the server's output.
        name, backend, batch: as in `package_triton`; backend "auto" is one that the available server has.
        start_s: maximum seconds for starting the server.
        progress: reports the installation of a server, if none is available.

    Raises:
        TargetError: there is no server, or no GPU for an engine that needs one, or the server did not start.
        InputError: a port is taken, or `log` cannot be written.
        BuildError, ModelError: as in `package_triton`.
    """
    needed_backend = check_backend(build, backend)
    if needed_backend == "tensorrt" and not gpu_present():
        raise TargetError(
            f"{build.path}: a {build.manifest.target} engine runs on an NVIDIA GPU, and this machine has none",
            hint="serve it on a machine with a GPU and its driver, or compile with --target onnxruntime",
        )
    check_package(
        build, repository, name=name, batch=batch
    )  # all checks that are possible before a server is installed
    try:
        log.open("wb").close()
    except OSError as error:
        raise InputError(f"--log {log}: cannot be written ({reason(error)})", hint=remedy(error, log.parent)) from error
    free_ports = choose_ports(host, ports or Ports())
    server = find_server(progress)
    package = package_triton(build, repository, name=name, backend=_fit(server, needed_backend, backend), batch=batch)
    with serve(server, package.path, log, host=host, ports=free_ports, start_s=start_s) as served:
        yield Serving(served, package, first_answer(served.url, package))


def _fit(server: TritonServer, needed: str, option: str) -> str:
    """The backend of `server` for `needed`. For the option "auto", Python's replaces a missing ONNX Runtime backend."""
    if not server.has("python"):
        raise TargetError(f"{server.binary}: has no Python backend in {server.backends}", hint=_CONTAINER)
    if needed == "onnxruntime" and option == "auto" and not server.has("onnxruntime"):
        return "python"
    if not server.has(needed):
        raise TargetError(f"{server.binary}: has no {needed} backend in {server.backends}", hint=_CONTAINER)
    return needed
