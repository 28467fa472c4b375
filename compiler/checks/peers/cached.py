"""Models that peers make of the dense one, kept in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from trimtab.compiler.cache import entry
from trimtab.compiler.caching.remembered import file_hash
from trimtab.compiler.sources.source import weights_hash
from trimtab.passes.hashing import hash_bytes


def cached_model(
    kind: str, dense: Path, parts: Sequence[str], make: Callable[[Path], object], name: str = "model.onnx"
) -> Path:
    """The file `name` that `make` writes, made once.

    Args:
        kind: folder of the cache.
        dense: the ONNX file it is made from.
        parts: what else it depends on.
        make: called with the path to write, which may get files beside it.
    """

    def fill(folder: Path) -> None:
        folder.mkdir()
        make(folder / name)

    return entry(kind, hash_bytes(file_hash(dense), weights_hash(dense), *parts), fill) / name
