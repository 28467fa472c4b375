"""The processes in which Triton's Python backend runs models ("stubs"): find them, and detect that one has ended.

A server that loses a stub answers every request to its model with an error but reports itself as healthy. Triton up to
24.05 started the stub again, later versions do not (triton-inference-server/server issue 8604).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import psutil

from trimtab.compiler.processes import Ending, ending

_NAME = "triton_python_b"  # the system keeps 15 characters
_UNKNOWN = Ending("ended", None)


class Stub(NamedTuple):
    """A process that runs a model.

    Attributes:
        model: the model's name in the repository.
    """

    process: psutil.Process
    model: str


def find_stubs(server: int) -> list[Stub]:
    """The stubs of the server with the process id `server`."""
    try:
        children = psutil.Process(server).children(recursive=True)
    except psutil.Error:  # the server is ending now; `Served.wait` reports that
        return []
    return [stub for child in children if (stub := _as_stub(child)) is not None]


def first_ended(stubs: list[Stub]) -> tuple[str, Ending] | None:
    """The model of a stub that has ended, and how it ended; None while all stubs run."""
    for stub in stubs:
        try:
            if stub.process.is_running() and stub.process.status() != psutil.STATUS_ZOMBIE:
                continue
        except psutil.NoSuchProcess:
            return stub.model, _UNKNOWN
        return stub.model, _ending_of(stub.process.pid)
    return None


def _as_stub(process: psutil.Process) -> Stub | None:
    """`process` with its model; None if it is no stub, or has ended."""
    try:
        if process.name().startswith(_NAME) and process.status() != psutil.STATUS_ZOMBIE:
            return Stub(process, _model_of(process.cmdline()))
    except psutil.Error:  # it ended since it was listed; the others still count
        pass
    return None


def _model_of(command: list[str]) -> str:
    """The model's name: the command line has the path `MODEL/VERSION/model.py`."""
    paths = [Path(word) for word in command if word.endswith(".py")]
    return paths[0].parts[-3] if paths and len(paths[0].parts) >= 3 else "of the server"


def _ending_of(pid: int) -> Ending:
    """How a process ended for which its parent has not waited: the last field of its state is the status of `wait`."""
    try:
        status = int(Path(f"/proc/{pid}/stat").read_text().rsplit(maxsplit=1)[-1])
    except (OSError, ValueError):
        return _UNKNOWN
    number = status & 0x7F
    return ending(-number if number else status >> 8)
