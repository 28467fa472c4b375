"""Stores new weights in a scratch file instead of in memory.

A pass may replace nearly all weights of a model. Within `scratch`, `constant` stores new weights in a file, like those
of the source model, and saving the graph copies them from there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO

import onnx_graphsurgeon as gs

from trimtab.passes.graph.weights import Derived, ExternalValues, append, stored_bytes

_MIN_BYTES = 1 << 20  # smaller weights stay in memory
_NAME = "made.data"

_file: ContextVar[tuple[Path, BinaryIO] | None] = ContextVar("scratch", default=None)


@contextmanager
def scratch(parent: Path) -> Iterator[None]:
    """Store weights created in the body in a file below `parent`. It is deleted at the end: save the graph before."""
    with tempfile.TemporaryDirectory(prefix=".made-", dir=parent) as name:
        folder = Path(name).resolve()
        with open(folder / _NAME, "wb") as file:
            token = _file.set((folder, file))
            try:
                yield
            finally:
                _file.reset(token)


def put_away(constant: gs.Constant) -> gs.Constant:
    """The same constant; large values are moved to the scratch file if one is open."""
    opened = _file.get()
    if opened is not None and stored_bytes(constant) >= _MIN_BYTES:
        folder, file = opened
        constant._values = ExternalValues(append(constant, file, _NAME).tensor, folder)
    return constant


def is_new(constant: gs.Constant) -> bool:
    """Whether the values of `constant` are new, and not stored in the files of the source model."""
    values, opened = constant._values, _file.get()
    if isinstance(values, Derived):
        return False
    return not isinstance(values, ExternalValues) or (opened is not None and values.path == opened[0] / _NAME)
