"""A running tritonserver: started, waited for, and stopped with all its children."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from trimtab.compiler.processes import end_with_parent, ending, tail
from trimtab.compiler.serving.example import ask
from trimtab.compiler.serving.find import TritonServer
from trimtab.compiler.serving.stubs import find_stubs, first_ended
from trimtab.passes.errors import InputError, TargetError

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_HEALTH_S = 5.0  # seconds for an answer to whether it is ready
_WATCH_S = 0.5  # between looks at the processes of its models
_LEAVE_S = 3  # seconds for requests under way and open connections
_KILL_S = _LEAVE_S + 1.0  # seconds after which a server that was told to end is ended by force
_RESTARTS = 3  # in `_WINDOW_S`, after which the model is at fault, and not a bad day
_WINDOW_S = 120.0
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Ports:
    """Where a server listens. 0 becomes a port that is free."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002


@dataclass
class Served:
    """A server that is ready.

    Attributes:
        host, ports: where it listens.
        process: the server itself.
        log: file with what it says.
        restart: stops it and starts it again; None: where the process of a model ends, it stays ended.
    """

    host: str
    ports: Ports
    process: subprocess.Popen[bytes]
    log: Path
    restart: Callable[[], subprocess.Popen[bytes]] | None = None

    @property
    def url(self) -> str:
        """Of HTTP."""
        return f"http://{in_url(self.host)}:{self.ports.http}"

    def wait(self) -> None:
        """Until it ends, which it should not. Where the process of a model ends, the server is started again.

        Raises:
            TargetError: it ended, or the process of a model did again and again; shows the end of its log.
        """
        restarts: list[float] = []
        stubs = find_stubs(self.process.pid)
        while True:
            with suppress(subprocess.TimeoutExpired):
                how = ending(self.process.wait(_WATCH_S))
                raise TargetError(f"tritonserver {how.words}{tail(self.log)}", hint=how.hint)
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
            self.process = self.restart()
            stubs = find_stubs(self.process.pid)


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
    """Run `server` on `repository` for the time of the body.

    Args:
        log: file for what it says.
        ports: free ones, as `choose_ports` finds them.
        start_s: seconds that loading may take.

    Yields:
        the server, ready to answer.

    Raises:
        TargetError: the server ended or was not ready in time; shows the end of its log.
    """
    prefix = f"trimtab_{os.getpid()}_{ports.http}_"
    command = [
        str(server.binary), f"--model-repository={repository}", f"--backend-directory={server.backends}",
        "--disable-auto-complete-config",  # what is written is complete, and completing it starts every model twice
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
            for region in _SHARED_MEMORY.glob(f"{prefix}*"):  # what a server that was killed could not remove
                region.unlink(missing_ok=True)

    def start() -> subprocess.Popen[bytes]:
        stop()
        with log.open("ab") as output:
            running.append(
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                    env=os.environ | server.env,
                    start_new_session=True,  # so that Ctrl-C reaches us alone, and we stop it in order
                    preexec_fn=end_with_parent(),
                )
            )  # fmt: skip
        _await(running[-1], f"http://{in_url(host)}:{ports.http}/v2/health/ready", start_s, log)
        return running[-1]

    try:
        yield Served(host, ports, start(), log, start)
    finally:
        stop()


def in_url(host: str) -> str:
    """`host` as addresses write it before a port: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def choose_ports(host: str, ports: Ports) -> Ports:
    """`ports`, each of them free now.

    Raises:
        InputError: one is taken.
    """
    with ExitStack() as held:  # all at once, so that no two are the same
        return Ports(*(held.enter_context(_take(host, port, name)) for name, port in vars(ports).items()))


@contextmanager
def _take(host: str, port: int, name: str) -> Iterator[int]:
    """The number of a port that is ours for the time of the body."""
    option = "--port" if name == "http" else f"--{name}-port"
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port whose connections are closing is free
        try:
            held.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise InputError(
                f"{option} {port}: cannot listen there on {host} ({reason})",
                hint=f"give another {option}, or 0 for any",
            ) from error
        yield int(held.getsockname()[1])


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
                f"tritonserver was not ready in {start_s:g} s{_reason(log)}", hint="give more with --start-timeout"
            )
        time.sleep(_POLL_S)


def _reason(log: Path) -> str:
    """What the log says of the failure: the errors in it, else its end."""
    lines = log.read_text(errors="replace").splitlines()
    told = [line.strip() for line in lines if "failed to load" in line and line[:1] == "E"]
    return "".join(f"\n  {line}" for line in told) + tail(log)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server in order, and whatever of it is left by force: at once, where a second Ctrl-C comes."""
    try:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
