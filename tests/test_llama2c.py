"""The loader for llama2.c checkpoints, on a small model that was really trained."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.compiler import compile_model, load
from trimtab.compiler.checks.validate import validate
from trimtab.compiler.generation.text import generate_text

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "language-model" / "llama2c.py"


@pytest.mark.shared
def test_a_trained_model_tells_a_story(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "llama2c"
    command = [sys.executable, EXAMPLE, folder / "stories260K.bin", folder / "tok512.bin", tmp_path / "model"]
    subprocess.run(command, check=True, capture_output=True)
    recipe = {"passes": [], "workload": {"batch": [1, 1, 4], "tokens": [1, 16, 256]}}
    build = compile_model(tmp_path / "model", recipe, tmp_path / "build")
    *_, (answer,) = generate_text(load(build.path), ["Once upon a time"], max_tokens=12)
    assert answer.text.startswith(", there was a little")
    with gzip.open(shared / "data" / "tinystories" / "valid.txt.gz", "rt", encoding="utf-8") as stories:
        lines = [line.strip() for line in stories if len(line) > 400][:20]
    (tmp_path / "stories.txt").write_text("\n".join(lines))
    quality = validate(build, data=tmp_path / "stories.txt").quality
    assert quality is not None and quality.kind == "perplexity"
    assert quality.dense < 5 and quality.compiled == pytest.approx(quality.dense, rel=1e-4)
