"""A loaded build: what it computes, what it refuses, and what is needed to load it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from trimtab.compiler import compile_model, load
from trimtab.compiler.builds.build import Build, open_build
from trimtab.compiler.checks.dense import dense_model
from trimtab.compiler.engine import Engine
from trimtab.compiler.engine_options import MAX_THREADS
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner
from trimtab.passes.errors import BuildError, InputError, ModelError, TargetError


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("engine")
    return compile_model(tiny.model(folder / "model.onnx"), {"passes": ["canonicalize"]}, folder / "build")


@pytest.fixture(scope="module")
def engine(build: Build) -> Iterator[Engine]:
    yield load(build.path, threads=1)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 8), (3, 17), (32, 128)])
def test_it_computes_what_the_model_does(build: Build, engine: Engine, batch: int, tokens: int) -> None:
    feeds = {"input_ids": tiny.ids(batch, tokens, seed=batch)}
    wanted = OnnxRuntimeRunner(Path(build.manifest.source)).run(feeds)["last_hidden_state"]
    found = engine.run(feeds)
    assert list(found) == ["last_hidden_state"]
    np.testing.assert_allclose(found["last_hidden_state"], wanted, atol=1e-5)


def test_it_says_what_it_takes(engine: Engine) -> None:
    assert [(t.name, t.dtype, t.shape) for t in engine.inputs] == [("input_ids", "int64", ("batch", "tokens"))]
    assert [(t.name, t.shape) for t in engine.outputs] == [("last_hidden_state", ("batch", "tokens", tiny.WIDTH))]
    assert "onnxruntime" in repr(engine)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "'input_ids' is missing"),
        ({"input_ids": tiny.ids(1, 8), "mask": tiny.ids(1, 8)}, "unknown input 'mask'"),
        ({"input_idz": tiny.ids(1, 8)}, "did you mean 'input_ids'"),
        ({"input_ids": [[1, 2]]}, "is a list, not a numpy array"),
        ({"input_ids": tiny.ids(1, 8).astype(np.int32)}, "is int32, the engine takes int64"),
        ({"input_ids": tiny.ids(1, 8)[0]}, r"shape \[8\], the engine takes \[batch, tokens\]"),
        ({"input_ids": tiny.ids(3, 8)[:, :0]}, r"has texts of 0 tokens: \[3, 0\]"),
        ({1: tiny.ids(1, 8)}, "unknown input 1"),
        ({"input_ids": np.ma.masked_array(tiny.ids(2, 8), mask=True)}, "is a masked array"),
        ({"input_ids": tiny.ids(0, 8)[:, :0]}, r"has texts of 0 tokens: \[0, 0\]"),
        (None, "inputs is of type NoneType, not a mapping"),
        ([tiny.ids(1, 8)], "inputs is of type list, not a mapping"),
        ({"input_ids"}, "inputs is of type set, not a mapping"),
    ],
)
def test_inputs_it_does_not_take(engine: Engine, inputs: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        engine.run(inputs)


def test_inputs_that_disagree() -> None:
    from trimtab.compiler.builds.manifest import TensorInfo
    from trimtab.compiler.inputs import check_inputs

    wanted = [TensorInfo(name=name, dtype="float32", shape=("batch", 4)) for name in "ab"]
    check_inputs(wanted, {"a": np.zeros((2, 4), np.float32), "b": np.zeros((2, 4), np.float32)})
    with pytest.raises(InputError, match="'a' and 'b' disagree on batch: 2 and 3"):
        check_inputs(wanted, {"a": np.zeros((2, 4), np.float32), "b": np.zeros((3, 4), np.float32)})
    with pytest.raises(InputError, match=r"takes \[batch, 4\]"):
        check_inputs(wanted, {"a": np.zeros((2, 5), np.float32), "b": np.zeros((2, 4), np.float32)})


@pytest.mark.parametrize("threads", [0, -1, MAX_THREADS + 1, 10**12, 1.5, "2", True])
def test_counts_of_threads_that_no_machine_has(build: Build, threads: Any) -> None:
    with pytest.raises(InputError, match=rf"threads is {threads!r}, not an integer from 1 to {MAX_THREADS}"):
        load(build.path, threads=threads)
    assert load(build.path, threads=np.int64(2)).run({"input_ids": tiny.ids(1, 8)})


def test_texts_need_a_tokenizer(engine: Engine) -> None:
    with pytest.raises(ModelError, match="no tokenizer"):
        engine.tokenize(["Hello."])


def test_damage_is_found(tmp_path: Path) -> None:
    build = compile_model(tiny.model(tmp_path / "model.onnx"), {"passes": []}, tmp_path / "build")
    data = build.model.with_name("model.onnx.data")
    raw = bytearray(data.read_bytes())
    raw[100] ^= 1
    data.write_bytes(raw)
    with pytest.raises(BuildError, match=r"model/model\.onnx\.data: damaged"):
        load(build.path)


def test_a_runtime_that_is_gone(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    import trimtab.compiler.engine as module

    def gone(name: str) -> Any:
        raise TargetError(f"target {name} is not installed here")

    monkeypatch.setattr(module, "get_target", gone)
    with pytest.raises(TargetError, match="onnxruntime is not installed"):
        load(build.path)


def test_the_dense_model_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    compile_model(tiny.model(Path("model.onnx")), {"passes": []}, "build")
    monkeypatch.chdir("/")
    build = open_build(tmp_path / "build")
    feeds = {"input_ids": tiny.ids(2, 9)}
    wanted = OnnxRuntimeRunner(tmp_path / "model.onnx").run(feeds)["last_hidden_state"]
    dense = dense_model(build)
    np.testing.assert_allclose(OnnxRuntimeRunner(dense).run(feeds)["last_hidden_state"], wanted, atol=1e-5)
    (tmp_path / "model.onnx").unlink()
    assert dense_model(build) == dense  # from the cache
    for path in dense.parent.iterdir():
        path.unlink()
    with pytest.raises(ModelError, match=r"is gone.*--dense"):
        dense_model(build)
    tiny.model(tmp_path / "model.onnx", seed=1)
    with pytest.raises(ModelError, match=r"no longer those that were compiled.*--dense"):
        dense_model(build)


def test_opening_a_build_loads_nothing_that_only_checks_need() -> None:
    code = (
        "import sys, trimtab.compiler.engine; print(*sorted({'polygraphy', 'torch', 'transformers'} & {*sys.modules}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
