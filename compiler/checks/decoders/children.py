"""A decoder in a process of its own, which takes a step or reads a prompt on request."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from trimtab.compiler.checks.decoders.steps.serve import DONE
from trimtab.compiler.processes import ending
from trimtab.passes.errors import TargetError
from trimtab.passes.temporary import temporary_folder

STEPS = Path(__file__).resolve().parent / "steps"
"""The scripts that such processes run."""

_PATIENCE_S = 900.0  # time limit for a process to start, and for each answer
_LEAVE_S = 10.0  # time limit for a process to end by itself
_LINES = 3  # last lines of a process's log that an error shows


class Children:
    """Child processes that wait for their turns; they end with the context.

    Attributes:
        about: name → facts that the process reports about itself.
        steps, prompts: name → a call that has the process take one step, or read the prompt once, and waits.
    """

    def __init__(self) -> None:
        self.about: dict[str, dict[str, Any]] = {}
        self.steps: dict[str, Callable[[], object]] = {}
        self.prompts: dict[str, Callable[[], object]] = {}
        self._stack = ExitStack()
        self._logs = self._stack.enter_context(temporary_folder("decoders"))
        self._running: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start(self, name: str, python: Path | str, script: Path | str, **options: object) -> None:
        """Run `script`, one of STEPS or a path, with `options` as JSON; wait until it is ready.

        Raises:
            TargetError: the process ended before; shows the end of its log.
        """
        log_path = self._logs / f"{len(self._running)}.txt"
        try:
            with open(log_path, "wb") as log:
                child = subprocess.Popen(
                    [str(python), str(STEPS / script), json.dumps(options, default=str)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=_environment(),
                )  # fmt: skip
        except OSError as error:
            raise TargetError(
                f"{name}: {python} cannot be run ({error.strerror})",
                hint="give an interpreter of Python with --llama-python",
            ) from error
        self._stack.callback(_end, child)
        with _patience(child) as timed_out:
            about = next((message for line in child.stdout or () if (message := _parse_about(line)) is not None), None)
        if about is None:
            raise _ended(name, child, timed_out, "before the first step", log_path)
        self.about[name] = about
        self._running[name] = child
        self.steps[name], self.prompts[name] = (
            partial(_ask, name, child, what, log_path) for what in ("step", "prompt")
        )

    def resident_bytes(self, name: str) -> int:
        """RSS of the process and its children now: weights, cache, runtime, interpreter."""
        process = psutil.Process(self._running[name].pid)
        return sum(int(each.memory_info().rss) for each in (process, *process.children(recursive=True)))


def _ask(name: str, child: subprocess.Popen[str], what: str, log_path: Path) -> None:
    assert child.stdin is not None and child.stdout is not None
    with _patience(child) as timed_out, suppress(BrokenPipeError):
        child.stdin.write(f"{what}\n")
        child.stdin.flush()
        if any(line.strip() == DONE for line in child.stdout):
            return
    raise _ended(name, child, timed_out, f"in the middle of a {what}", log_path)


def _ended(
    name: str, child: subprocess.Popen[str], timed_out: threading.Event, when: str, log_path: Path
) -> TargetError:
    """The error for a process that no longer answers: how it ended, and the end of its log.

    Args:
        timed_out: set where the process was killed because it did not answer.
    """
    try:
        how = ending(child.wait(_LEAVE_S))
    except subprocess.TimeoutExpired:
        return TargetError(f"{name}: its process closed its output {when}{_last(log_path)}")
    if timed_out.is_set():
        return TargetError(f"{name}: its process gave no answer in {_PATIENCE_S:g} s {when}{_last(log_path)}")
    return TargetError(f"{name}: its process {how.words} {when}{_last(log_path)}", hint=how.hint)


@contextmanager
def _patience(child: subprocess.Popen[str]) -> Iterator[threading.Event]:
    """Kill a process that does not answer within `_PATIENCE_S`.

    Yields:
        An event that is set when the process is killed.
    """
    timed_out = threading.Event()

    def give_up() -> None:
        timed_out.set()
        child.kill()

    timer = threading.Timer(_PATIENCE_S, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield timed_out
    finally:
        timer.cancel()


def _parse_about(line: str) -> dict[str, Any] | None:
    """Parse a line in which a process reports facts about itself as JSON; libraries may print other lines before it."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def _environment() -> dict[str, str]:
    """Environment variables under which a script can import the modules beside it."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}


def _last(log_path: Path) -> str:
    lines = [line.strip() for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    return f": {' '.join(lines[-_LINES:])[-300:]}" if lines else ""


def _end(child: subprocess.Popen[str]) -> None:
    if child.stdin is not None:
        with suppress(BrokenPipeError):
            child.stdin.close()
    try:
        child.wait(timeout=_LEAVE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
