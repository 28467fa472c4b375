"""Each kind of cache entry: damaged in any file it is made again, with the same content, and never used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import zoo

from trimtab.compiler import profile_cache
from trimtab.compiler.cache import is_sound
from trimtab.compiler.checks.dense import dense_model
from trimtab.compiler.checks.peers import same_target
from trimtab.compiler.checks.peers.ort import quantized
from trimtab.compiler.checks.peers.same_target import dense_engine
from trimtab.compiler.data import read_data
from trimtab.compiler.pipeline import compile_model
from trimtab.compiler.recipe import Calibration
from trimtab.compiler.sources import Source, from_torch, huggingface, open_source
from trimtab.compiler.targets import crossover
from trimtab.compiler.targets.base import ENGINE
from trimtab.compiler.workload import Workload
from trimtab.passes.crossover import Crossover, SparseShape
from trimtab.passes.errors import ModelError


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def huggingface_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A BERT whose export is the one that the tests keep, and takes no time."""

    def export(checkpoint: object, part: Path, allow_pickle: bool) -> None:
        for file in zoo.exported("bert").parent.glob("model.onnx*"):
            shutil.copy(file, part)

    monkeypatch.setattr(huggingface, "_export", export)
    return zoo.save_pretrained("bert", tmp_path / "bert")


def onnx_source(path: Path) -> Source:
    return Source(str(path), path, None, None, None, "onnx")


class Engines:
    """Stands in for a target that builds engines, in two files."""

    def build(self, model: Path, workload: Workload, out: Path) -> None:
        out.mkdir()
        (out / "model.engine").write_bytes(model.read_bytes())
        (out / "engine.json").write_text("{}")

    def open(self, folder: Path, threads: int) -> Any:
        opened.append(folder / ENGINE)
        return type("Runner", (), {"run": None})


opened: list[Path] = []

Use = Callable[[], Path]
"""Uses an entry, and gives the path of its file or folder."""


@pytest.fixture
def use(request: pytest.FixtureRequest, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Use:
    kind = request.param
    if kind == "sources":
        folder = request.getfixturevalue("huggingface_folder")
        return lambda: open_source(folder).onnx.parent
    if kind == "torch":
        from trimtab.compiler.sources import torch_export

        monkeypatch.setattr(torch_export, "export_module", lambda module, args, path, **_: tiny.model(path))
        return lambda: from_torch(Engines(), ()).onnx.parent  # type: ignore[arg-type]
    model = tiny.model(tmp_path / "model.onnx", external=True)
    if kind == "profiles":
        data = read_data(tiny.data(tmp_path / "data.npz"))

        def profile() -> Path:
            used = profile_cache.measured_profile(onnx_source(model), data, Calibration(samples=8, states=16))
            (path,) = (root / "profiles").glob("*.safetensors")
            assert all(np.isfinite(tensor).all() for tensor in used.tensors.values())
            return path

        return profile
    if kind == "dense":
        build = compile_model(model, {"passes": []}, tmp_path / "build")
        return lambda: dense_model(build).parent
    if kind == "dense-int8":
        return lambda: quantized(model).parent
    if kind == "dense-engines":
        monkeypatch.setattr(same_target, "get_target", lambda name: Engines())

        def engine() -> Path:
            dense_engine("fake", model, Workload(), 1)
            return opened[-1].parent

        return engine
    assert kind == "crossovers"
    times = Crossover(1.0, 0.1, 2.0, ((1, 0.5), (2, 0.75)))
    monkeypatch.setattr(crossover, "measure", lambda shape, options: times)

    def measured() -> Path:
        from trimtab.compiler.targets.sessions import session_options

        assert crossover.measured_crossover(SparseShape(64, 32, 2, "fp32"), lambda: session_options(1)) == times
        (path,) = (root / "crossovers").iterdir()
        return path

    return measured


KINDS = ("sources", "torch", "profiles", "dense", "dense-int8", "dense-engines", "crossovers")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.message for each in caplog.records if each.name == "trimtab.compiler.cache"]


@pytest.mark.parametrize("use", KINDS, indirect=True)
def test_damage_anywhere_is_noticed(use: Use, caplog: pytest.LogCaptureFixture) -> None:
    seed = int(np.random.default_rng().integers(1 << 30))
    print("seed", seed)
    rng = np.random.default_rng(seed)
    path = use()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    sound = {file: file.read_bytes() for file in files}
    assert not warnings(caplog)
    for file in files:
        for damage in ("flip", "truncate", "remove", *(["add"] if path.is_dir() else [])):
            data, stat = bytearray(sound[file]), file.stat()
            if damage == "flip":
                data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            if damage == "remove":
                file.unlink()
            elif damage == "add":
                (file.parent / "shards.json").write_text("{}")
            else:
                file.write_bytes(data[: len(data) - (damage == "truncate")])
                os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            caplog.clear()
            assert not is_sound(path)
            assert use() == path
            assert is_sound(path)
            present = {each for each in ([path] if path.is_file() else path.rglob("*")) if each.is_file()}
            assert present == set(files)
            assert len(warnings(caplog)) == (0 if damage == "remove" and path == file else 1)
            assert all(each.read_bytes() == sound[each] for each in files if each.suffix not in VARYING)


VARYING = {".safetensors"}
"""Whose JSON need not come out in the same order."""


def damage(folder: Path) -> None:
    file = max(folder.glob("model.onnx*"), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 64
    file.write_bytes(data)


def test_a_damaged_export_is_not_where_the_dense_model_comes_from(
    huggingface_folder: Path, tmp_path: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is exported again from what the user gave, if that is still the same model."""
    build = compile_model(huggingface_folder, {"passes": []}, tmp_path / "build")
    want = {file.name: file.read_bytes() for file in dense_model(build).parent.iterdir()}
    for spoil in (damage, lambda folder: (folder / "model.onnx").write_bytes(b"cut"), shutil.rmtree):
        shutil.rmtree(root / "dense")
        spoil(Path(build.manifest.source).parent)
        assert {file.name: file.read_bytes() for file in dense_model(build).parent.iterdir()} == want
        assert is_sound(Path(build.manifest.source))
    shutil.rmtree(root / "dense")
    shutil.rmtree(huggingface_folder)
    dense_model(build)
    shutil.rmtree(root / "dense")
    damage(Path(build.manifest.source).parent)
    with pytest.raises(ModelError, match="dense model of this build is gone"):
        dense_model(build)


@pytest.mark.parametrize("change", ["weights", "graph"])
def test_another_model_is_never_the_dense_one(tmp_path: Path, root: Path, change: str) -> None:
    """Whatever its file is called: after one changed byte it is another model, of which there is another build."""
    model = tiny.model(tmp_path / "model.onnx", external=True)
    build = compile_model(model, {"passes": []}, tmp_path / "build")
    kept = dense_model(build)
    if change == "weights":
        data = tmp_path / "model.onnx.data"
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    else:
        model.write_bytes(model.read_bytes().replace(b"Relu", b"Tanh"))
    assert dense_model(build) == kept  # of the old model, whole and verified
    shutil.rmtree(root / "dense")
    with pytest.raises(ModelError, match=f"its {change} (are|is) no longer"):
        dense_model(build)
    again = compile_model(model, {"passes": []}, tmp_path / "build")
    assert not again.reused
    assert dense_model(again) != kept
    assert json.loads((tmp_path / "build" / "manifest.json").read_text())["key"] != build.manifest.key
