"""A build, served: packaged for the server at hand, started, and asked once."""

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
from trimtab.plugins.driver import gpu_present

_CONTAINER = "run NVIDIA's container on what `trimtab package --triton` writes"


@dataclass(frozen=True)
class Serving:
    """A build that is served.

    Attributes:
        server: the running server.
        package: what it serves.
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
    """Serve `build` for the time of the body.

    Args:
        repository: folder that is written for the server; it must not exist, and stays.
        log: file for what the server says.
        name, backend, batch: as `package_triton` takes them; backend "auto" is what the server at hand can run.
        start_s: seconds that loading may take.
        progress: of the installation of a server, where there is none.

    Raises:
        TargetError: no server, no GPU for an engine that needs one, or the server did not start.
        InputError: a port is taken, or `log` cannot be written.
        BuildError, ModelError: as `package_triton`.
    """
    wanted = check_backend(build, backend)
    if wanted == "tensorrt" and not gpu_present():
        raise TargetError(
            f"{build.path}: a {build.manifest.target} engine runs on an NVIDIA GPU, and this machine has none",
            hint="serve it on a machine with a GPU and its driver, or compile with --target onnxruntime",
        )
    check_package(build, repository, name=name, batch=batch)  # all that can be known before a server is installed
    try:
        log.open("wb").close()
    except OSError as error:
        raise InputError(f"--log {log}: cannot be written ({error.strerror})", hint="give another file") from error
    chosen = choose_ports(host, ports or Ports())
    server = find_server(progress)
    package = package_triton(build, repository, name=name, backend=_fit(server, wanted, backend), batch=batch)
    with serve(server, package.path, log, host=host, ports=chosen, start_s=start_s) as served:
        yield Serving(served, package, first_answer(served.url, package))


def _fit(server: TritonServer, wanted: str, asked: str) -> str:
    """The backend that `server` has for `wanted`: where ONNX Runtime's was not asked for by name, Python's will do."""
    if not server.has("python"):
        raise TargetError(f"{server.binary}: has no Python backend in {server.backends}", hint=_CONTAINER)
    if wanted == "onnxruntime" and asked == "auto" and not server.has("onnxruntime"):
        return "python"
    if not server.has(wanted):
        raise TargetError(f"{server.binary}: has no {wanted} backend in {server.backends}", hint=_CONTAINER)
    return wanted
