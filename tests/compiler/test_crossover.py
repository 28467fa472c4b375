"""The crossover as ONNX Runtime shows it: measured once, kept, and told in the report."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import zoo
from seeds import seeded

from trimtab.compiler import compile_model
from trimtab.compiler.targets import crossover, get_target
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner
from trimtab.compiler.targets.sparse_trials import dense_model, random_blocks, random_layers, sparse_model
from trimtab.passes.crossover import DenseForm, Load, SparseShape


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(crossover, "_SECONDS", 0.0)
    return tmp_path / "cache"


@pytest.mark.parametrize(("matrices", "form"), [(3, "fp32"), (2, "int8"), (1, "int4")])
def test_times_are_those_of_both_forms(matrices: int, form: str, cache: Path) -> None:
    shape = SparseShape(640, 96, matrices, form, 2 if matrices > 1 else 1, 3)  # type: ignore[arg-type]
    measure = get_target("onnxruntime").crossover(1)
    assert measure is not None
    found = measure(shape)
    assert found is not None
    assert found.dense > 0
    assert found.full > 0
    assert [tokens for tokens, _ in found.together] == [1, 2, 4, 8, 16, 32]
    assert found.together[-1][1] > found.together[0][1] > 0


@pytest.mark.parametrize(("matrices", "form", "tokens"), [(3, "fp32", 4), (2, "int8", 100), (1, "int8", 7)])
def test_calls_of_several_tokens_are_timed_as_such(matrices: int, form: str, tokens: int, cache: Path) -> None:
    shape = SparseShape(640, 96, matrices, form, 2 if matrices > 1 else 1, 3, tokens=tokens)  # type: ignore[arg-type]
    measure = get_target("onnxruntime").crossover(1)
    assert measure is not None
    found = measure(shape)
    assert found is not None
    assert found.call is not None
    assert found.call.tokens == min(tokens, 64)
    assert min(found.call.dense, found.call.whole) > 0
    assert min(found.call.fixed, found.call.read, found.call.each) >= 0
    assert found.call.sparse(Load(tokens, 1, 1)) > found.call.fixed
    assert found.call.sparse(Load(tokens, 1, 1, whole=True)) == found.call.whole
    assert measure(shape) == found  # from the cache


@pytest.mark.parametrize("dense", get_args(DenseForm))
@pytest.mark.parametrize("matrices", [1, 3])
def test_dense_layers_are_timed_in_the_form_that_they_would_have(matrices: int, dense: DenseForm, cache: Path) -> None:
    measure = get_target("onnxruntime").crossover(1)
    assert measure is not None
    found = measure(SparseShape(640, 96, matrices, "int8", 1, 2, dense))  # type: ignore[arg-type]
    assert found is not None
    assert found.form == dense
    assert found == measure(SparseShape(640, 96, matrices, "int8", 1, 2, dense))  # type: ignore[arg-type]


@pytest.mark.parametrize("dense", get_args(DenseForm))
@pytest.mark.parametrize("width", [64, 48, 40])
@pytest.mark.parametrize("matrices", [1, 2, 3])
def test_dense_trials_of_all_forms_compute_about_the_same(
    matrices: int, width: int, dense: DenseForm, tmp_path: Path
) -> None:
    """Also of sizes that no block divides, or only a small one."""
    seed = int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    rng, layers = np.random.default_rng(seed), random_layers(2 * width - 4, width, matrices, 1)
    feeds = {"x": rng.standard_normal((2, 3, width), np.float32)}
    exact, rounded = (
        OnnxRuntimeRunner(dense_model(layers, tmp_path / f"{form}.onnx", form)).run(feeds)["y"]
        for form in ("fp32", dense)
    )
    assert np.linalg.norm(rounded - exact) <= (0.2 if dense == "int4-blocks" else 0.05) * np.linalg.norm(exact)
    assert dense == "fp32" or width == 40 or (rounded != exact).any()


def test_is_measured_once_for_each_shape_and_number_of_threads(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, target = SparseShape(64, 32, 2, "fp32"), get_target("onnxruntime")
    one, two = target.crossover(1), target.crossover(2)
    assert one is not None
    assert two is not None
    first = one(shape)
    (file,) = (cache / "crossovers").glob("*.json")
    measured: list[SparseShape] = []
    real = crossover.measure
    monkeypatch.setattr(crossover, "measure", lambda s, options: measured.append(s) or real(s, options))
    assert one(shape) == first
    assert measured == []
    two(shape)
    assert measured == [shape]
    file.write_text("{")
    one(shape)
    assert measured == [shape, shape]


def test_other_targets_know_none() -> None:
    assert get_target("tensorrt-rtx").crossover() is None


@pytest.mark.parametrize("matrices", [1, 2, 3])
def test_both_forms_compute_the_same(matrices: int, tmp_path: Path) -> None:
    from rewrite import session

    made = random_layers(40, 24, matrices, 1 if matrices == 1 else 2)
    x = seeded().standard_normal((1, 5, 24), np.float32)
    (dense,) = session(dense_model(made, tmp_path / "dense.onnx")).run(None, {"x": x})
    blocks = {f"blocks{i}": np.arange(40, dtype=np.int32)[None] for i in range(len(made))}
    (sparse,) = session(sparse_model(made, tmp_path / "sparse.onnx", 1, "fp32")).run(None, {"x": x} | blocks)
    np.testing.assert_allclose(sparse, dense, rtol=1e-4, atol=1e-5)
    chosen = random_blocks(seeded(), 5, 40, 7)
    assert chosen.shape == (5, 7)
    assert (np.diff(chosen, axis=1) > 0).all()


def test_a_compile_says_where_dense_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of 108 neurons is nothing to read: its choice takes longer than all of it."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    folder = zoo.save_pretrained("llama", tmp_path / "model")
    (tmp_path / "data.txt").write_text("\n".join(f"w{5 + i} w9 w{7 + i % 50} w8" for i in range(80)))
    plan = {"passes": [{"ffn-topk": {"density": 0.9, "recall": 0.5}}], "threads": 1}
    build = compile_model(folder, plan, tmp_path / "build", data=tmp_path / "data.txt")
    (told,) = build.manifest.passes
    assert told.changed == 0
    assert len(told.left) == 2
    assert "measured" in (tmp_path / "build" / "report.md").read_text()


@pytest.mark.parametrize(
    ("family", "workload", "tokens"),
    [
        ("bert", {"batch": [1, 2, 4], "tokens": [1, 3, 8]}, 6),
        ("bert", {}, 8 * 48),
        ("llama", {"batch": [1, 3, 4], "past": [0, 4, 8]}, 3),
        ("llama", {}, 1),
    ],
)
def test_a_compile_measures_the_calls_of_its_workload(
    family: str, workload: dict[str, list[int]], tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[SparseShape] = []
    of_target = "trimtab.compiler.targets.onnxruntime.measured_crossover"
    monkeypatch.setattr(of_target, lambda shape, _: shapes.append(shape))
    folder = zoo.save_pretrained(family, tmp_path / "model")
    (tmp_path / "data.txt").write_text("\n".join(f"w{5 + i} w9 w{7 + i % 50} w8" for i in range(80)))
    plan = {"passes": [{"ffn-threshold": {"sparsity": 0.5}}], "threads": 1, "workload": workload, "check": False}
    compile_model(folder, plan, tmp_path / "build", data=tmp_path / "data.txt")
    assert {shape.tokens for shape in shapes} == {tokens}
