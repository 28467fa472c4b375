"""A tritonserver process: start it, wait for it, and stop it with all its children."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from trimtab.compiler.processes import end_with_parent, ending, tail
from trimtab.compiler.serving.example import ask
from trimtab.compiler.serving.find import TritonServer
from trimtab.compiler.serving.stubs import Stub, find_stubs, first_ended
from trimtab.passes.errors import InputError, TargetError

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_HEALTH_S = 5.0  # seconds to wait for the answer to a health request
_WATCH_S = 0.5  # seconds between checks of the processes of its models
_LEAVE_S = 3  # seconds for active requests and open connections
_KILL_S = _LEAVE_S + 1.0  # seconds after which a server that should end is killed
_RESTARTS = 3  # restarts within `_WINDOW_S` after which the model is considered faulty
_WINDOW_S = 120.0
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Ports:
    """The ports of a server. 0 stands for a free port."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002


@dataclass
class Served:
    """A server that is ready.

    Attributes:
        host, ports: where it listens.
        process: the server itself.
        log: file with its output.
        restart: stops the server and starts it again; if None, a model's process that ended is not started again.
        stubs: the processes of its models when it was ready; one that ends before `wait` is noticed too.
    """

    host: str
    ports: Ports
    process: subprocess.Popen[bytes]
    log: Path
    restart: Callable[[], subprocess.Popen[bytes]] | None = None
    stubs: list[Stub] = field(default_factory=list)

    @property
    def url(self) -> str:
        """URL of the HTTP port."""
        return f"http://{in_url(self.host)}:{self.ports.http}"

    def wait(self) -> None:
        """Wait until the server ends, which is an error. If the process of a model ends, start the server again.

        Raises:
            TargetError: the server ended, or the process of a model ended too often; shows the end of the log.
        """
        restarts: list[float] = []
        stubs = self.stubs
        while True:
            with suppress(subprocess.TimeoutExpired):
                how = ending(self.process.wait(_WATCH_S))
                raise TargetError(f"tritonserver {how.words}{tail(self.log)}", hint=how.hint)
            stubs = stubs or find_stubs(self.process.pid)  # the first look may come before they run
            ended = first_ended(stubs)
            if ended is None or self.restart is None:
                continue
            model, how = ended
            restarts = [at for at in restarts if at > time.monotonic() - _WINDOW_S]
            if len(restarts) == _RESTARTS:
                times = f"{len(restarts) + 1} times in {_WINDOW_S:g} s"
                raise TargetError(f"the process of model {model} {how.words}, {times}{tail(self.log)}", hint=how.hint)
            restarts.append(time.monotonic())
            logger.warning("the process of model %s %s; the server starts again", model, how.words)
            process = self.restart()
            stubs, self.process = find_stubs(process.pid), process


@contextmanager
def serve(
    server: TritonServer,
    repository: Path,
    log: Path,
    *,
    host: str = "127.0.0.1",
    ports: Ports,
    start_s: float = 120.0,
) -> Iterator[Served]:
    """Run `server` on `repository` while the body runs.

    Args:
        log: file for its output.
        ports: free ports, from `choose_ports`.
        start_s: maximum seconds for loading the models.

    Yields:
        The server, ready to answer.

    Raises:
        TargetError: the server ended or was not ready in time; shows the end of its log.
    """
    prefix = f"trimtab_{os.getpid()}_{ports.http}_"
    command = [
        str(server.binary), f"--model-repository={repository}", f"--backend-directory={server.backends}",
        "--disable-auto-complete-config",  # the configuration is complete, and completing it starts every model twice
        f"--http-address={host}", f"--http-port={ports.http}", f"--grpc-address={host}", f"--grpc-port={ports.grpc}",
        f"--metrics-address={host}", f"--metrics-port={ports.metrics}", f"--exit-timeout-secs={_LEAVE_S}",
        f"--backend-config=python,shm-region-prefix-name={prefix}",
    ]  # fmt: skip
    running: list[subprocess.Popen[bytes]] = []

    def stop() -> None:
        try:
            while running:
                _stop(running[-1])
                running.pop()
        finally:
            for region in _SHARED_MEMORY.glob(f"{prefix}*"):  # regions that a killed server could not remove
                region.unlink(missing_ok=True)

    def start() -> subprocess.Popen[bytes]:
        stop()
        with log.open("ab") as output:
            running.append(
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                    env=os.environ | server.env,
                    start_new_session=True,  # so that Ctrl-C reaches only trimtab, which then stops the server
                    preexec_fn=end_with_parent(),
                )
            )  # fmt: skip
        _await(running[-1], f"http://{in_url(host)}:{ports.http}/v2/health/ready", start_s, log)
        return running[-1]

    try:
        process = start()
        yield Served(host, ports, process, log, start, find_stubs(process.pid))
    finally:
        stop()


def in_url(host: str) -> str:
    """`host` as it is written in a URL: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def choose_ports(host: str, ports: Ports) -> Ports:
    """`ports`, all free now, with a free port for each 0.

    Raises:
        InputError: a port is taken.
    """
    with ExitStack() as sockets:  # all ports are bound at the same time, so that no two are equal
        return Ports(*(sockets.enter_context(_take(host, port, name)) for name, port in vars(ports).items()))


@contextmanager
def _take(host: str, port: int, name: str) -> Iterator[int]:
    """Bind a port while the body runs; yields its number."""
    option = "--port" if name == "http" else f"--{name}-port"
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port whose connections are closing is free
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise InputError(
                f"{option} {port}: cannot listen there on {host} ({reason})",
                hint=f"give another {option}, or 0 for any",
            ) from error
        yield int(listener.getsockname()[1])


def _await(process: subprocess.Popen[bytes], url: str, start_s: float, log: Path) -> None:
    deadline = time.monotonic() + start_s
    while True:
        if process.poll() is not None:
            how = ending(process.returncode)
            raise TargetError(f"tritonserver did not start: it {how.words}{_reason(log)}", hint=how.hint)
        left = deadline - time.monotonic()
        with suppress(TargetError):
            ask(url, timeout_s=min(max(left, _POLL_S), _HEALTH_S))
            return
        if time.monotonic() > deadline:
            raise TargetError(
                f"tritonserver was not ready in {start_s:g} s{_reason(log)}",
                hint="give more seconds with --start-timeout",
            )
        time.sleep(_POLL_S)


def _reason(log: Path) -> str:
    """The cause of the failure in the log: errors about models, and the last lines."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [line.strip() for line in lines if "failed to load" in line and line[:1] == "E"]
    return "".join(f"\n  {line}" for line in errors) + tail(log)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the server, then kill what is left of it; at once on a second Ctrl-C."""
    try:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
