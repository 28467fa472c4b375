"""The dense model that a build is compared with."""

from __future__ import annotations

import logging
from pathlib import Path

from trimtab.compiler.builds.build import Build
from trimtab.compiler.builds.manifest import Manifest
from trimtab.compiler.cache import cache_dir, entry, is_sound
from trimtab.compiler.sources import Source, open_source
from trimtab.passes.errors import ModelError
from trimtab.passes.graph import save_graph
from trimtab.passes.hashing import hash_bytes

log = logging.getLogger(__name__)

_HINT = "give the dense ONNX file with --dense FILE, or compile the model again"


def dense_model(build: Build) -> Path:
    """The dense graph that `build` was compiled from, canonicalized, as an ONNX file in the cache.

    It is made from the ONNX file that was compiled, where that still exists, else from the model as the user named it.

    Raises:
        ModelError: both are gone, or have changed since.
    """
    manifest = build.manifest

    def make(part: Path) -> None:
        source = _source(manifest)
        part.mkdir()
        save_graph(source.graph(), part / "model.onnx")

    key = hash_bytes(manifest.fingerprint, manifest.graph, manifest.versions["trimtab"])
    return entry("dense", key, make) / "model.onnx"


def exported_model(build: Build) -> Path:
    """The ONNX file that `build` was compiled from, as the user gave it or the exporter wrote it.

    Raises:
        ModelError: the file is gone, or has changed since.
    """
    return _source(build.manifest).onnx


def dense_source(build: Build, onnx: Path) -> Source:
    """The dense model of `build`, read from the file `onnx`, with the build's tokenizer and names."""
    manifest = build.manifest
    return Source(
        origin=manifest.origin, onnx=onnx, tokenizer=build.tokenizer, labels=manifest.labels,
        max_tokens=manifest.max_tokens, kind="onnx",
    )  # fmt: skip


def _source(manifest: Manifest) -> Source:
    """The model that was compiled.

    Raises:
        ModelError: the model is gone, or has changed since.
    """
    onnx = Path(manifest.source)
    cached = onnx.is_relative_to(cache_dir())
    if onnx.is_file() and (not cached or is_sound(onnx)):
        source = Source(
            origin=manifest.origin, onnx=onnx, tokenizer=None, labels=manifest.labels,
            max_tokens=manifest.max_tokens, kind="onnx",
        )  # fmt: skip
    else:
        if onnx.is_file():
            log.warning("cache: %s is damaged; the model is read again from %s", onnx, manifest.origin)
        try:
            source = open_source(manifest.origin)
        except ModelError as error:
            raise ModelError(f"the dense model of this build is gone: {error.message}", hint=_HINT) from error
    hashes = source.hashes
    if hashes.weights != manifest.fingerprint:
        raise ModelError(f"{manifest.origin}: its weights are no longer those that were compiled", hint=_HINT)
    if hashes.graph != manifest.graph:
        raise ModelError(f"{manifest.origin}: its graph is no longer the one that was compiled", hint=_HINT)
    return source
