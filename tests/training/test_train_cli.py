"""`trimtab train` as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zoo

from trimtab.passes.profile import Profile

RECIPE = "passes:\n  - ffn-split: {heavy: 0.5, rest_form: drop, multiple: 8}\n  - recover\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    zoo.save_pretrained("bert", folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    lines = [" ".join(str((7 * i + j) % 90) for j in range(3 + i % 9)) for i in range(80)]
    (folder / "data.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def trimtab(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trimtab.compiler.cli", *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def train(
    folder: Path, *more: str, recipe: str = "recipe.yaml", data: str = "data.txt", out: str = "out.safetensors"
) -> subprocess.CompletedProcess[str]:
    given = (recipe, "--data", data, "-o", out, "--batch-size", "8", "--max-tokens", "16", "--lr", "1e-3")
    return trimtab(folder, "train", "model", *given, *more)


def test_train_then_compile(folder: Path) -> None:
    """One process learns, with its own BLAS threads; another compiles with what it learned."""
    run = train(folder, "--steps", "6", "--json")
    assert run.returncode == 0, run.stderr
    record = json.loads(run.stdout)
    assert record["steps"] == 6
    assert record["history"][0]["step"] == 0
    learned = Profile.load(folder / "out.safetensors").learned("recover")
    assert any(name.startswith("ffn-split/layer.2/") for name in learned)
    built = trimtab(folder, "compile", "model", "recipe.yaml", "-o", "build", "--profile", "out.safetensors")
    assert built.returncode == 0, built.stderr
    assert (folder / "build" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "none.txt"}, "none.txt: no such file"),
        ({"data": "one.txt"}, "one.txt: 1 sample"),
        ({"recipe": "plain.yaml"}, "the recipe has no pass 'recover'"),
        ({"out": "nowhere/out.safetensors"}, "nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_message(folder: Path, change: dict[str, str], message: str) -> None:
    (folder / "one.txt").write_text("1 2 3\n", encoding="utf-8")
    (folder / "plain.yaml").write_text("passes:\n  - ffn-split\n", encoding="utf-8")
    run = train(folder, "--steps", "1", **change)
    assert run.returncode == 1
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""
    assert not list(folder.glob("**/*.part"))


def test_profile_of_another_model_is_refused(folder: Path) -> None:
    from recovery import empty_profile, onnx_source

    from trimtab.passes.profile import FFNStats

    other = empty_profile(onnx_source("roberta"))
    other.set_ffn(0, FFNStats(2, *(np.zeros(3) for _ in range(3)), np.zeros((2, 4), np.float32)))
    other.save(folder / "other.safetensors")
    run = train(folder, "--steps", "1", "--profile", "other.safetensors")
    assert run.returncode == 1
    assert "belongs to another model" in run.stderr
