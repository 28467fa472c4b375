"""New weights that leave memory as soon as they are made.

A pass may replace nearly all weights of a model. Within `scratch`, what `constant` makes lies in a file from then on,
as the weights of the source do, and is copied from there when the graph is saved.
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

_LEAST = 1 << 20  # bytes of a weight that is worth a place in the file
_NAME = "made.data"

_file: ContextVar[tuple[Path, BinaryIO] | None] = ContextVar("scratch", default=None)


@contextmanager
def scratch(parent: Path) -> Iterator[None]:
    """Let weights made in the body lie in a file below `parent`, which goes with it: save the graph before."""
    with tempfile.TemporaryDirectory(prefix=".made-", dir=parent) as name:
        folder = Path(name).resolve()
        with open(folder / _NAME, "wb") as file:
            token = _file.set((folder, file))
            try:
                yield
            finally:
                _file.reset(token)


def put_away(constant: gs.Constant) -> gs.Constant:
    """The same constant, its values in the scratch file if there is one and they are large."""
    held = _file.get()
    if held is not None and stored_bytes(constant) >= _LEAST:
        folder, file = held
        constant._values = ExternalValues(append(constant, file, _NAME).tensor, folder)
    return constant


def is_new(constant: gs.Constant) -> bool:
    """Whether the values of `constant` were made here, and do not lie in the source's files."""
    values, held = constant._values, _file.get()
    if isinstance(values, Derived):
        return False
    return not isinstance(values, ExternalValues) or (held is not None and values.path == held[0] / _NAME)
