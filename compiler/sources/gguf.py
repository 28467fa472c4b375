"""A GGUF file, as llama.cpp takes it → a Hugging Face directory in the cache, unpacked by a child process."""

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
"""The modules whose code decides what is unpacked."""
_HINT = "give the model's Hugging Face checkpoint"


def is_gguf(path: Path) -> bool:
    """Whether the file is called as GGUF files are."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def unpacked(path: Path) -> Path:
    """The folder with config.json, the weights in float32 and the tokenizer, if the file has one that can be read.

    Weights have the values that the file's types stand for. Of several processes that ask at once, one unpacks.

    Raises:
        ModelError: damaged, or of an architecture or a type that cannot be read; or a package is missing.
        BuildError: the cache cannot be written.
    """
    require_packages(_PACKAGES, ModelError, what=f"{path}: reading a GGUF file", extra="gguf")

    def make(part: Path) -> None:
        try:
            read_header(path)  # without torch: what is damaged is refused at once
        except ModelError as error:
            raise ModelError(f"{path}: {error.message}", hint=error.hint) from error
        part.mkdir()
        log.info("%s: unpacking", path)
        run_child(
            "trimtab.compiler.sources.gguf_unpack", [str(path.resolve()), str(part)], part, makes="config.json",
            origin=path, what="unpacking it", hint=_HINT,
        )  # fmt: skip

    return entry("gguf", content_key(file_hash(path), _UNPACKING, _PACKAGES), make)
