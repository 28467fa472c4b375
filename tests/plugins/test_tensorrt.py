"""Plugins for TensorRT: declared to NVIDIA's own layer in a child process, since to import it can end a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lean import surroundings

HERE = Path(__file__).resolve().parent / "lean"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Surroundings in which `tensorrt` can be imported."""
    pytest.importorskip("triton", reason="the kernels need the package triton")
    try:
        made = surroundings.make(tmp_path_factory.mktemp("lean"))
    except surroundings.MissingError as error:
        pytest.skip(f"NVIDIA's plugin layer: {error}")
    command = [sys.executable, "-c", "import tensorrt.plugin"]
    tried = subprocess.run(command, env=os.environ | made, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"NVIDIA's plugin layer does not import here: {tried.stderr.strip()[-300:]}")
    return made


@pytest.mark.slow
def test_plugins_pass_nvidias_layer(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", HERE / "checks.py"]
    paths = os.pathsep.join([environment["PYTHONPATH"], str(HERE), str(HERE.parent)])
    done = subprocess.run(
        command,
        env=os.environ | environment | {"PYTHONPATH": paths, "TRITON_INTERPRET": "0"},
        cwd=HERE.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
