"""Models that peers derive from the dense one, stored in the cache."""

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
    """The file `name` that `make` writes; it runs once per cache key.

    Args:
        kind: folder of the cache.
        dense: the ONNX file that `make` reads.
        parts: the rest of the cache key, such as versions.
        make: called with the path to write; it may write further files beside it.
    """

    def fill(folder: Path) -> None:
        folder.mkdir()
        make(folder / name)

    return entry(kind, hash_bytes(file_hash(dense), weights_hash(dense), *parts), fill) / name
