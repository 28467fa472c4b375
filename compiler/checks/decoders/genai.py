"""The folder that ONNX Runtime GenAI's own model builder writes for a checkpoint, in int4."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from trimtab.compiler.cache import entry
from trimtab.compiler.caching.remembered import file_hash
from trimtab.compiler.processes import end_with_parent, ending
from trimtab.compiler.sources.gguf import is_gguf, unpacked
from trimtab.passes.errors import TargetError
from trimtab.passes.hashing import hash_bytes

PACKAGE = "onnxruntime_genai"
_OPTIONS = ("int4_block_size=32", "int4_accuracy_level=4")
_HINT = "leave the peer 'genai-int4' out"


def genai_model(origin: Path) -> Path:
    """The folder for `origin`, made once and stored in the cache: int4 weights in blocks of 32, int8 activations.

    Args:
        origin: a Hugging Face directory, or a GGUF file.

    Raises:
        TargetError: the package does not take the model.
        ModelError: the GGUF file cannot be read.
    """
    checkpoint = unpacked(origin) if is_gguf(origin) else origin
    if not (checkpoint / "config.json").is_file():
        raise TargetError(f"peer 'genai-int4' starts from a Hugging Face directory, not from {origin}", hint=_HINT)
    version = importlib.metadata.version("onnxruntime-genai")
    hashes = [file_hash(path) for path in sorted(checkpoint.iterdir()) if path.is_file()]
    return entry("genai-int4", hash_bytes(version, *hashes), lambda folder: build_genai(checkpoint, folder))


def build_genai(checkpoint: Path, folder: Path) -> None:
    """Write the model into `folder`.

    Raises:
        TargetError: the builder failed; shows its last line.
    """
    command = [
        sys.executable, "-m", f"{PACKAGE}.models.builder", "-i", checkpoint, "-o", folder, "-p", "int4", "-e", "cpu",
        "-c", folder / "cache", "--extra_options", *_OPTIONS,
    ]  # fmt: skip
    run = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, preexec_fn=end_with_parent()
    )
    if run.returncode:
        last = run.stderr.strip().splitlines()[-1:] or ["it printed nothing"]
        how = ending(run.returncode)
        raise TargetError(
            f"{checkpoint}: onnxruntime-genai's builder {how.words}: {last[0][:200]}", hint=how.hint or _HINT
        )
