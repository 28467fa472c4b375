"""ONNX files in the cache of Hugging Face's hub, whose snapshots are links to the blobs of a repository."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny

from trimtab.compiler import compile_model
from trimtab.compiler.calibrate import calibrate
from trimtab.compiler.checks.validate import validate
from trimtab.compiler.data import read_data
from trimtab.compiler.sources import open_source
from trimtab.passes.errors import ModelError
from trimtab.passes.graph import load_graph, values


def cached(root: Path, name: str, folder: str = "", data: str | Path | None = None) -> Path:
    """`tiny.model` with external data as the hub's cache has it.

    Args:
        name: of the repository's folder.
        folder: in the snapshot.
        data: where the link of the data leads; by default to their blob.
    """
    root.mkdir(exist_ok=True)
    plain = tiny.model(root / "model.onnx", external=True)
    blobs, snapshot = root / name / "blobs", root / name / "snapshots" / "5f0c" / folder
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    up = "../" * (2 + len(Path(folder).parts))
    shutil.copy(plain, blobs / "3a")
    shutil.copy(root / "model.onnx.data", blobs / "7b")
    (snapshot / "model.onnx").symlink_to(f"{up}blobs/3a")
    (snapshot / "model.onnx.data").symlink_to(f"{up}blobs/7b" if data is None else data)
    return snapshot / "model.onnx"


@pytest.mark.parametrize("folder", ["", "onnx", "onnx/small"])
def test_links_to_blobs_are_followed(folder: str, tmp_path: Path) -> None:
    path = cached(tmp_path, "models--someone--tiny", folder)
    source = open_source(path)
    plain = load_graph(tmp_path / "model.onnx").tensors()
    for name, tensor in load_graph(path).tensors().items():
        if hasattr(tensor, "values"):
            np.testing.assert_array_equal(values(tensor), values(plain[name]))
    assert source.fingerprint == open_source(tmp_path / "model.onnx").fingerprint
    profile = calibrate(source, read_data(tiny.data(tmp_path / "data.npz")), samples=8, states=16)
    assert profile.info.samples == 8


def test_a_build_finds_its_dense_model_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cached(tmp_path / "hub", "models--someone--tiny", "onnx")
    workload = {"tokens": [1, 4, 8], "batch": [1, 2, 4]}
    build = compile_model(path, {"passes": [], "workload": workload}, tmp_path / "build")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))  # without the dense model
    assert not validate(build).failures


@pytest.mark.parametrize("way", ["out", "another repository", "blobs that are a link", "no cache", "a circle"])
def test_links_that_leave_the_repository_are_refused(way: str, tmp_path: Path) -> None:
    name, data = "models--someone--tiny", None
    if way == "out":
        data = tmp_path / "model.onnx.data"
    elif way == "another repository":
        data = cached(tmp_path / "hub", "models--else--tiny").resolve().parent / "7b"
    elif way == "no cache":
        name = "tiny"
    elif way == "a circle":
        data = "model.onnx.data"
    path = cached(tmp_path, name, data=data)
    if way == "blobs that are a link":
        (tmp_path / name / "blobs").rename(tmp_path / "blobs")
        (tmp_path / name / "blobs").symlink_to(tmp_path / "blobs")
    with pytest.raises(ModelError, match="outside the model's folder") as caught:
        open_source(path)
    assert caught.value.hint
