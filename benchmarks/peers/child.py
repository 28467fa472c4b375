"""A decoder in a process of its own, which takes one step when it is told to."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class Children:
    """Child processes that wait for their turns; they end with the context.

    Attributes:
        about: name → what each said of itself.
        steps: name → a call that lets it take one step, and waits.
    """

    def __init__(self) -> None:
        self.about: dict[str, dict[str, Any]] = {}
        self.steps: dict[str, Callable[[], object]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start(self, name: str, python: Path | str, script: str, *words: object) -> None:
        """Run `script` of this folder, which must call `serve`, and wait until it is ready."""
        command = [str(python), str(HERE / script), *map(str, words)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._stack.callback(_end, child)
        # Libraries may print before their first step; `about` is the first line of JSON.
        line = next((line for line in child.stdout or () if line.startswith("{")), None)
        if line is None:
            raise SystemExit(f"{' '.join(command)} ended before its first step")
        self.about[name] = json.loads(line)
        self.steps[name] = lambda: _step(name, child)


def _step(name: str, child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write("\n")
    child.stdin.flush()
    if not child.stdout.readline():
        raise SystemExit(f"{name} ended in the middle")


def _end(child: subprocess.Popen[str]) -> None:
    if child.stdin is not None:
        child.stdin.close()
    try:
        child.wait(timeout=10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
