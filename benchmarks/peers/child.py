"""A decoder in a process of its own, which takes a step, or reads a prompt, when it is told to."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


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
        self.steps[name], self.prompts[name] = (partial(_ask, name, child, what) for what in ("step", "prompt"))


def _ask(name: str, child: subprocess.Popen[str], what: str) -> None:
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(f"{what}\n")
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
