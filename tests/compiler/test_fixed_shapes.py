"""Models that take one batch and one length of text: texts are cut and filled up to them wherever they are read."""

from __future__ import annotations

import shutil
from pathlib import Path

import heads
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from seeds import seeded
from typer.testing import CliRunner

from trimtab.compiler import compile_model, load
from trimtab.compiler.calibrate import calibrate
from trimtab.compiler.cli.app import app
from trimtab.compiler.data import batches, read_data
from trimtab.compiler.fixed_shapes import in_whole_batches
from trimtab.compiler.sources import open_source
from trimtab.passes.errors import DataError, InputError

BATCH, TOKENS = 3, 7


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A classifier of any shape; the same of one shape; and labelled texts, shorter and longer, in no whole batches."""
    root = tmp_path_factory.mktemp("fixed")
    free = heads.save_onnx(heads.head_model("bert", 3, num_labels=3), root / "free").parent
    shutil.copytree(free, root / "fixed")
    model = onnx.load(root / "fixed" / "model.onnx")
    for tensor in (*model.graph.input, *model.graph.output):
        for size, axis in zip((BATCH, TOKENS), tensor.type.tensor_type.shape.dim, strict=False):
            if axis.dim_param:
                axis.dim_value = size
    onnx.save(model, root / "fixed" / "model.onnx")
    rng = seeded()
    rows = [" ".join(f"w{i}" for i in rng.integers(0, 20, rng.integers(1, 14))) for _ in range(4 * BATCH + 2)]
    texts = root / "texts.tsv"
    texts.write_text("text\tlabel\n" + "".join(f"{row}\t{i % 3}\n" for i, row in enumerate(rows)))
    return free, root / "fixed", texts


def test_more_samples_than_the_batch_are_refused() -> None:
    run = in_whole_batches(lambda feeds: dict(feeds), [gs.Variable("x", np.float32, [BATCH, 2])])
    values = seeded().random((BATCH + 1, 2), np.float32)
    for rows in (1, BATCH):
        np.testing.assert_array_equal(run({"x": values[:rows]})["x"], values[:rows])
    with pytest.raises(InputError, match=f"takes {BATCH} samples at once, and the feeds have {BATCH + 1}"):
        run({"x": values})


def test_calibration_sees_the_same_tokens(folders: tuple[Path, Path, Path]) -> None:
    free, fixed, texts = folders
    wanted, found = (
        calibrate(open_source(folder), read_data(texts), max_tokens=TOKENS, states=400) for folder in (free, fixed)
    )
    assert (found.info.samples, found.info.tokens) == (wanted.info.samples, wanted.info.tokens)
    assert found.tensors.keys() == wanted.tensors.keys()
    for name, array in wanted.tensors.items():
        np.testing.assert_allclose(found.tensors[name], array, rtol=1e-4, atol=1e-4)


def test_a_build_is_validated_and_timed(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, fixed, texts = folders
    workload = {"batch": BATCH, "tokens": TOKENS}
    build = tmp_path / "build"
    recipe = {"passes": [{"ffn-split": {"heavy": 0.5}}], "workload": workload}
    compile_model(fixed / "model.onnx", recipe, build, data=texts)
    engine = load(build)
    short = ["w1", "w2 w3", "w4 " * 30]
    inputs = engine.tokenize(short)
    assert {array.shape for array in inputs.values()} == {(BATCH, TOKENS)}
    assert engine.tokenize(short, max_tokens=4)["attention_mask"].sum(1).tolist() == [3, 4, 4]
    assert engine.run(inputs)["logits"].shape == (BATCH, 3)
    for words in (
        ["validate", str(build), "--data", str(texts), "--min-quality", "0"],
        ["bench", str(build), "--seconds", "0.1"],
    ):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output


def test_tensors_of_another_length_are_refused(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, fixed, _ = folders
    np.savez(tmp_path / "d.npz", **heads.feeds(np.random.default_rng(0), 5, TOKENS + 1))
    with pytest.raises(DataError, match=rf"has shape \(5, {TOKENS + 1}\), the model wants"):
        next(batches(read_data(tmp_path / "d.npz"), open_source(fixed)))
    np.savez(tmp_path / "e.npz", **heads.feeds(np.random.default_rng(0), 5, TOKENS))
    sizes = [len(feed["input_ids"]) for feed in batches(read_data(tmp_path / "e.npz"), open_source(fixed))]
    assert sizes == [BATCH, 5 - BATCH]
