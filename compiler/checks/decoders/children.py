"""A decoder in a process of its own, which takes a step, or reads a prompt, when it is told to."""

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

_PATIENCE_S = 900.0  # that a process has to come up, or to answer
_LEAVE_S = 10.0  # that a process has to end by itself
_LINES = 3  # of what a process said last, that an error repeats


class Children:
    """Child processes that wait for their turns; they end with the context.

    Attributes:
        about: name → what each said of itself.
        steps, prompts: name → a call that lets it do that once, and waits.
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
            TargetError: it ended before; says what it said last.
        """
        said = self._logs / f"{len(self._running)}.txt"
        try:
            with open(said, "wb") as log:
                child = subprocess.Popen(
                    [str(python), str(STEPS / script), json.dumps(options, default=str)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=_surroundings(),
                )  # fmt: skip
        except OSError as error:
            raise TargetError(f"{name}: {python} cannot be run ({error.strerror})") from error
        self._stack.callback(_end, child)
        with _patience(child) as waited:
            about = next((found for line in child.stdout or () if (found := _told(line)) is not None), None)
        if about is None:
            raise _ended(name, child, waited, "before the first step", said)
        self.about[name] = about
        self._running[name] = child
        self.steps[name], self.prompts[name] = (partial(_ask, name, child, what, said) for what in ("step", "prompt"))

    def resident_bytes(self, name: str) -> int:
        """Memory that the process holds now, and those that it has started: weights, cache, runtime, interpreter."""
        process = psutil.Process(self._running[name].pid)
        return sum(int(each.memory_info().rss) for each in (process, *process.children(recursive=True)))


def _ask(name: str, child: subprocess.Popen[str], what: str, said: Path) -> None:
    assert child.stdin is not None and child.stdout is not None
    with _patience(child) as waited, suppress(BrokenPipeError):
        child.stdin.write(f"{what}\n")
        child.stdin.flush()
        if any(line.strip() == DONE for line in child.stdout):
            return
    raise _ended(name, child, waited, f"in the middle of a {what}", said)


def _ended(name: str, child: subprocess.Popen[str], waited: threading.Event, when: str, said: Path) -> TargetError:
    """The error of a process that answers no more: how it has ended, and what it said last.

    Args:
        waited: set where it was ended because it did not answer.
    """
    try:
        how = ending(child.wait(_LEAVE_S))
    except subprocess.TimeoutExpired:
        return TargetError(f"{name}: its process closed its output {when}{_last(said)}")
    if waited.is_set():
        return TargetError(f"{name}: its process gave no answer in {_PATIENCE_S:g} s {when}{_last(said)}")
    return TargetError(f"{name}: its process {how.words} {when}{_last(said)}", hint=how.hint)


@contextmanager
def _patience(child: subprocess.Popen[str]) -> Iterator[threading.Event]:
    """End a process that does not answer, so that nobody waits for it for ever.

    Yields:
        an event that is set when the process is ended.
    """
    waited = threading.Event()

    def give_up() -> None:
        waited.set()
        child.kill()

    timer = threading.Timer(_PATIENCE_S, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield waited
    finally:
        timer.cancel()


def _told(line: str) -> dict[str, Any] | None:
    """What a process says of itself, a line of JSON; libraries may print others before."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _surroundings() -> dict[str, str]:
    """Those in which a script finds its neighbours."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}


def _last(said: Path) -> str:
    lines = [line.strip() for line in said.read_text(errors="replace").splitlines() if line.strip()]
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
