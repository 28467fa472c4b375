"""The native library: found, chosen by processor, loaded by old and new runtimes, and done without."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from dialects import close, finish, graph_of, native
from filelock import FileLock
from seeds import seeded

from trimtab.plugins import FOLDERS, SELECT_BLOCKS, add_node, library

HERE = Path(__file__).resolve().parent
OLDEST = "1.20.1"
"""Of ONNX Runtime, that is tested beside the one that is installed."""

INSTRUCTION_SETS = ("portable", "avx2", "avx_vnni", "avx512", "avx512_vnni")


KERNELS = (
    "test_sparse.py", "test_select_blocks.py", "test_packed_attention.py", "test_glu.py", "test_int4_blocks.py",
    "test_int4_linear.py", "test_int8_linear.py", "test_sparse_variable.py",
)  # fmt: skip
WITH_BYTES = KERNELS[-4:]
"""Those of kernels that multiply bytes, which VNNI makes others of."""


def run_tests(*files: str, **surroundings: str) -> str:
    """The tests of the kernels once more, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *(HERE / file for file in files)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | surroundings, cwd=HERE.parents[1]
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout


def test_is_installed() -> None:
    assert library.library_path() is not None
    assert library.instruction_set() in INSTRUCTION_SETS


def test_has_the_kernel_of_every_op() -> None:
    """An op whose kernel is missing would be tested by its body, without a word."""
    sources = HERE.parents[1] / "plugins"
    with_kernels = {name for name, folder in FOLDERS.items() if (sources / folder / "cpu.h").is_file()}
    assert library.kernels() == with_kernels, f"{library.library_path()} is old: run `make native`, or install again"


@pytest.mark.slow
@pytest.mark.parametrize("wanted", INSTRUCTION_SETS)
def test_every_instruction_set_computes_the_same(wanted: str) -> None:
    """Also the guard that nothing of a better processor's code is reached on a lesser one's path."""
    show = "from trimtab.plugins.library import instruction_set; print(instruction_set())"
    got = subprocess.run(
        [sys.executable, "-c", show],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"TRIMTAB_ISA": wanted},
    ).stdout.strip()
    if got != wanted:
        pytest.skip(f"this processor has no {wanted}")
    run_tests(*(WITH_BYTES if wanted.endswith("vnni") else KERNELS), TRIMTAB_ISA=wanted)


@pytest.mark.slow
def test_the_oldest_runtime_loads_it() -> None:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab-tests"
    folder = home / f"onnxruntime-{OLDEST}"
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder.with_suffix(".lock"))):
        if not (folder / "onnxruntime").is_dir():
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--target",
                folder,
                f"onnxruntime=={OLDEST}",
            ]
            plain = {key: value for key, value in os.environ.items() if "CONSTRAINT" not in key}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=plain)
            if done.returncode:
                pytest.skip(f"onnxruntime {OLDEST} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    version = subprocess.run(
        [sys.executable, "-c", "import onnxruntime; print(onnxruntime.__version__)"],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path},
    ).stdout.strip()  # fmt: skip
    assert version == OLDEST
    run_tests(*KERNELS, "test_keep_tokens.py", PYTHONPATH=path)


@pytest.mark.parametrize("place", ["missing", "damaged"])
def test_without_it_bodies_compute_the_same(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    graph = graph_of(scores=(np.float32, ["tokens", 24]))
    model = finish(graph, add_node(graph, SELECT_BLOCKS, {"scores": graph.inputs[0]}, "blocks", k=5))
    scores = seeded().standard_normal((3, 24)).astype(np.float32)
    (wanted,) = native(model).run(None, {"scores": scores})
    bad = tmp_path / "trimtab_ops.so"
    if place == "damaged":
        bad.write_bytes(b"no library")
    monkeypatch.setenv("TRIMTAB_OPS_LIBRARY", str(bad))
    library._warn.cache_clear()
    options = ort.SessionOptions()
    with caplog.at_level(logging.WARNING):
        assert not library.register(options)
    assert "slower" in caplog.text
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    close(session.run(None, {"scores": scores})[0], wanted)
