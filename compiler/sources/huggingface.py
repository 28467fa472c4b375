"""Hugging Face directory → ONNX file in the cache, exported by a child process the first time."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

from trimtab.compiler.cache import entry
from trimtab.compiler.sources.checkpoint import Checkpoint
from trimtab.passes.errors import ModelError

log = logging.getLogger(__name__)

_EXPORTING = ("export.py", "transformer.py", "decoder.py", "torch_export.py", "pooling.py")
"""The modules whose code decides what is exported."""


def exported(checkpoint: Checkpoint, *, allow_pickle: bool) -> Path:
    """The ONNX file of `checkpoint`. Of several processes that ask at once, one exports and the others wait.

    Raises:
        ModelError: torch or transformers is missing, or the export fails; says why.
        BuildError: the cache cannot be written.
    """
    for package in ("torch", "transformers", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                f"{checkpoint.folder}: reading a Hugging Face model needs {package}",
                hint='pip install "trimtab[huggingface]"',
            )

    def make(part: Path) -> None:
        part.mkdir()
        log.info("%s: exporting %s with torch", checkpoint.folder, checkpoint.architecture)
        _export(checkpoint, part, allow_pickle)

    return entry("sources", _key(checkpoint), make) / "model.onnx"


def _key(checkpoint: Checkpoint) -> str:
    digest = hashlib.sha256(checkpoint.digest.encode())
    for name in _EXPORTING:
        digest.update((Path(__file__).parent / name).read_bytes())
    for package in ("torch", "transformers", "onnxscript"):
        digest.update(f"{package} {importlib.metadata.version(package)}".encode())
    return digest.hexdigest()[:32]


def _export(checkpoint: Checkpoint, out: Path, allow_pickle: bool) -> None:
    command = [sys.executable, "-m", "trimtab.compiler.sources.export", str(checkpoint.model.resolve()), str(out)]
    command.append(checkpoint.architecture)
    if allow_pickle:
        command.append("--allow-pickle")
    if checkpoint.pooling:
        command += ["--sentence", str(checkpoint.folder.resolve()), json.dumps(checkpoint.pooling._asdict())]
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    log_file = out / "export.log"
    with open(log_file, "wb") as output:
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | quiet, check=False
        ).returncode
    if code == 0 and (out / "model.onnx").is_file():
        return
    if (out / "error.json").is_file():
        said = json.loads((out / "error.json").read_text())
        raise ModelError(f"{checkpoint.folder}: {said['message']}", hint=said["hint"])
    lines = log_file.read_text(errors="replace").strip().splitlines()[-3:]
    how = f"was killed by signal {-code}, perhaps for lack of memory" if code < 0 else "failed"
    raise ModelError(
        f"{checkpoint.folder}: the export of {checkpoint.architecture} {how}: {' | '.join(lines) or 'it said nothing'}",
        hint="export the model to ONNX by other means and give that file",
    )
