"""GGUF file of llama.cpp → Hugging Face directory in the cache, unpacked by a child process."""

from __future__ import annotations

import logging
from pathlib import Path

from trimtab.compiler.cache import entry
from trimtab.compiler.caching.remembered import file_hash
from trimtab.compiler.sources.child import content_key, run_child
from trimtab.compiler.sources.gguf_header import read_header
from trimtab.passes.errors import ModelError
from trimtab.passes.optional import require_packages

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "transformers", "accelerate", "gguf")
_UNPACKING = ("gguf_header.py", "gguf_unpack.py")
"""The modules whose code decides the content of the directory."""
_HINT = "give the model's Hugging Face checkpoint"


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file with the suffix of GGUF files."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def unpacked(path: Path) -> Path:
    """Unpack a GGUF file to a folder with config.json, weights in float32, and the tokenizer if it can be read.

    Quantized weights are dequantized. If several processes unpack the same file, one does the work and the others wait.

    Raises:
        ModelError: the file is damaged, its architecture or a type cannot be read, or a package is missing.
        BuildError: the cache cannot be written.
    """
    require_packages(_PACKAGES, ModelError, what=f"{path}: reading a GGUF file", extra="gguf")

    def make(part: Path) -> None:
        try:
            read_header(path)  # needs no torch, so damaged files are refused at once
        except ModelError as error:
            raise ModelError(f"{path}: {error.message}", hint=error.hint) from error
        part.mkdir()
        log.info("%s: unpacking", path)
        run_child(
            "trimtab.compiler.sources.gguf_unpack", [str(path.resolve()), str(part)], part, makes="config.json",
            origin=path, what="unpacking it", hint=_HINT,
        )  # fmt: skip

    return entry("gguf", content_key(file_hash(path), _UNPACKING, _PACKAGES), make)
