"""The dense model that a build is compared with."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from trimtab.compiler.builds.build import Build
from trimtab.compiler.builds.manifest import Manifest
from trimtab.compiler.cache import cache_dir
from trimtab.compiler.sources import Source, open_source
from trimtab.passes.errors import ModelError
from trimtab.passes.graph import save_graph

_HINT = "give the dense ONNX file with --dense FILE, or compile the model again"


def dense_model(build: Build) -> Path:
    """The dense graph that `build` was compiled from, canonicalized, as an ONNX file in the cache.

    Made from the ONNX file that was compiled, where that is still there, else from the model as the user named it.

    Raises:
        ModelError: both are gone, or are another model by now.
    """
    manifest = build.manifest
    parts = (manifest.fingerprint, manifest.graph, manifest.versions["trimtab"])
    folder = cache_dir() / "dense" / hashlib.sha256(" ".join(parts).encode()).hexdigest()
    path = folder / "model.onnx"
    if not path.is_file():
        source = _source(manifest)
        if source.fingerprint != manifest.fingerprint:
            raise ModelError(f"{manifest.origin}: its weights are no longer those that were compiled", hint=_HINT)
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as part:
            save_graph(source.graph(), Path(part) / path.name)
            folder.mkdir(exist_ok=True)
            for file in sorted(Path(part).iterdir(), reverse=True):  # the data first, then the graph that needs them
                file.replace(folder / file.name)
    return path


def _source(manifest: Manifest) -> Source:
    if Path(manifest.source).is_file():
        return Source(
            origin=manifest.origin, onnx=Path(manifest.source), tokenizer=None, labels=manifest.labels,
            max_tokens=manifest.max_tokens, kind="onnx",
        )  # fmt: skip
    try:
        return open_source(manifest.origin)
    except ModelError as error:
        raise ModelError(f"the dense model of this build is gone: {error.message}", hint=_HINT) from error
