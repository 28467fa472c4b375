"""Training of routers in processes of its own: two that learn together, and one that the system kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import learner
import numpy as np
import pytest
import zoo
from safetensors.numpy import load_file

SETTINGS: dict[str, Any] = {
    "steps": 24, "group": 4, "lr": 1e-3, "batch_size": 8, "max_tokens": 16, "layer_tokens": 512, "minutes": 600.0,
    "layerwise": 1.0, "soft": 1.0, "hard": 1.0, "lora_rank": 2,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    zoo.save_pretrained("bert", tmp_path / "model")
    rng = np.random.default_rng(3)
    rows = [{"text": " ".join(f"w{word}" for word in rng.integers(4, 34, 9)), "label": i % 3} for i in range(120)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_two_processes_learn_as_one_model(folder: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run(folder, *launch, learner.__file__, "new", json.dumps(SETTINGS))
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(done.stdout)  # of one process alone
    assert record["stages"] == {"layerwise": 8, "soft": 8, "hard": 8}
    assert all(np.isfinite(value).all() for value in load_file(folder / "new").values())
    assert sorted(path.name for path in folder.iterdir()) == ["model", "new", "texts.jsonl"]


def test_a_run_that_the_system_kills_goes_on(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    killed = run(folder, learner.__file__, "new", json.dumps(SETTINGS), "soft mask", "6")  # some steps behind a look
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert list(folder.glob(".new.training/soft/checkpoint-*")) and not (folder / "new").exists()
    stages: dict[str, set[str]] = {"new": set(), "whole": set()}
    for out, names in stages.items():
        learner.learn(folder, out, SETTINGS, lambda what, done, total, names=names: names.add(what))
    assert "FFN by FFN" in stages["whole"] - stages["new"] and "begins anew" not in caplog.text
    went_on, whole = load_file(folder / "new"), load_file(folder / "whole")
    assert went_on.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_allclose(went_on[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert sorted(path.name for path in folder.iterdir()) == ["model", "new", "texts.jsonl", "whole"]
