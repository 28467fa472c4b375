"""Hugging Face directory → ONNX file in the cache, exported by a child process the first time."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from trimtab.compiler.cache import entry
from trimtab.compiler.sources.checkpoint import Checkpoint
from trimtab.compiler.sources.child import content_key, read_note, run_child
from trimtab.passes.errors import ModelError
from trimtab.passes.optional import require_packages

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "transformers", "onnxscript")
_EXPORTING = ("config.py", "export.py", "transformer.py", "decoder.py", "torch_export.py", "pooling.py")
"""The modules whose code decides the exported file."""


def exported(checkpoint: Checkpoint, *, allow_pickle: bool) -> Path:
    """The ONNX file of `checkpoint`. If several processes need the same file, one exports it and the others wait.

    Raises:
        ModelError: torch or transformers is missing, or the export fails; says why.
        BuildError: the cache cannot be written.
    """
    what = f"{checkpoint.folder}: reading a Hugging Face model"
    require_packages(_PACKAGES, ModelError, what=what, extra="huggingface")

    def make(part: Path) -> None:
        part.mkdir()
        log.info("%s: exporting %s with torch", checkpoint.folder, checkpoint.architecture)
        _export(checkpoint, part, allow_pickle)

    folder = entry("sources", content_key(checkpoint.digest, _EXPORTING, _PACKAGES), make)
    note = read_note(folder)
    if note is not None:
        log.warning("%s: %s %s", checkpoint.folder, checkpoint.architecture, note)
    return folder / "model.onnx"


def _export(checkpoint: Checkpoint, out: Path, allow_pickle: bool) -> None:
    arguments = [str(checkpoint.model.resolve()), str(out), checkpoint.architecture]
    if allow_pickle:
        arguments.append("--allow-pickle")
    if checkpoint.pooling:
        arguments += ["--sentence", str(checkpoint.folder.resolve()), json.dumps(checkpoint.pooling._asdict())]
    run_child(
        "trimtab.compiler.sources.export", arguments, out, makes="model.onnx", origin=checkpoint.folder,
        what=f"the export of {checkpoint.architecture}",
        hint="export the model to ONNX by other means and give that file",
    )  # fmt: skip
