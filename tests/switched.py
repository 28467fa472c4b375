"""Two builds that take turns under one name, and a hook that lets the turn fall on any file that a reader opens."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from trimtab.compiler.builds.build import Build, open_build
from trimtab.compiler.builds.writer import BuildWriter


def put(out: Path, kept: Build) -> None:
    """Put a copy of `kept` in the place of `out`, as a compile does."""
    with BuildWriter(out) as writer:
        for name in kept.manifest.files:
            (writer.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(kept.path / name, writer.folder / name)
        assert writer.commit(kept.manifest).hash == kept.hash


def variant(kept: Build, out: Path) -> Build:
    """`kept` with larger weights, and a tokenizer of other ids."""
    with BuildWriter(out) as writer:
        for name in kept.manifest.files:
            path = writer.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(kept.path / name, path)
            if path.suffix == ".data":
                (1.5 * np.fromfile(path, np.float32)).astype(np.float32).tofile(path)
            if path.name == "tokenizer.json":
                tokenizer = json.loads(path.read_text())
                vocabulary = tokenizer["model"]["vocab"]
                words = [word for word in vocabulary if word.startswith("w")]
                vocabulary |= dict(zip(words, [vocabulary[word] for word in [*words[1:], words[0]]], strict=True))
                path.write_text(json.dumps(tokenizer))
        writer.commit(kept.manifest.model_copy(update={"key": "another", "created": "2031-01-01T00:00:00+00:00"}))
    return open_build(out)


_listeners: list[Callable[[str, str], None]] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _listeners and event in ("open", "subprocess.Popen"):
        listeners, _listeners[:] = _listeners[:], []  # what a listener does itself is not told
        try:
            path = arguments[0] if isinstance(arguments[0], (str, bytes, os.PathLike)) else ""
            for listener in listeners:
                listener(event, os.fsdecode(path))
        finally:
            _listeners[:] = listeners


sys.addaudithook(_hook)


@contextmanager
def listening(listener: Callable[[str, str], None]) -> Iterator[None]:
    """Call `listener` with (event, path) before a file is opened or a process started, in the time of the body."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.clear()


@contextmanager
def at_open(number: int, folder: Path, then: Callable[[], object]) -> Iterator[list[str]]:
    """Call `then` at the `number`-th file opened below `folder`; yields the files that were."""
    opened: list[str] = []

    def listener(event: str, path: str) -> None:
        if event == "open" and path.startswith(f"{folder}{os.sep}"):
            opened.append(path)
            if len(opened) == number:
                then()

    with listening(listener):
        yield opened
