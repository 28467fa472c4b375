"""Texts that are longer than a model has positions for: refused with their length, wherever they come from."""

from __future__ import annotations

from pathlib import Path

import heads
import numpy as np
import pytest
from seeds import seeded
from typer.testing import CliRunner

from trimtab.compiler import compile_model, load
from trimtab.compiler.calibrate import calibrate
from trimtab.compiler.cli.app import app
from trimtab.compiler.data import read_data
from trimtab.compiler.sources import open_source
from trimtab.passes.errors import InputError, RecipeError

MOST = heads.TEXT + 2  # positions of a tiny model
WORKLOAD = {"batch": [1, 2, 4], "tokens": [1, 8, MOST + 1]}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build whose recipe asks for one token too many, of a model whose files do not say how long a text may be."""
    folder = tmp_path_factory.mktemp("long")
    path = heads.save_onnx(heads.head_model("bert", 3, num_labels=3), folder / "model", max_position_embeddings=None)
    settings = path.parent / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace(f'"model_max_length": {heads.TEXT}', '"model_max_length": null'))
    return compile_model(path, {"passes": ["unpad"], "workload": WORKLOAD, "threads": 1}, folder / "build").path


def feeds(tokens: int) -> dict[str, np.ndarray]:
    return heads.feeds(seeded(), 2, tokens)


def test_an_engine(build: Path) -> None:
    engine = load(build)
    assert engine.manifest.max_tokens == MOST
    assert engine.tokenize([" ".join(["w1"] * 600)])["input_ids"].shape == (1, MOST)
    assert engine.tokenize(["w1 " * 600], max_tokens=600)["input_ids"].shape == (1, MOST)
    full = feeds(MOST) | {"attention_mask": np.ones((2, MOST), np.int64)}
    assert engine.run(full)["logits"].shape == (2, 3)
    for tokens in (MOST + 1, 600):
        with pytest.raises(InputError, match=f"texts of {tokens} tokens, the model has positions for {MOST}; cut"):
            engine.run(feeds(tokens))


def test_commands(build: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "long.npz", **feeds(600))
    path = build.parent / "model/model.onnx"
    for words, says in (
        (["calibrate", str(path), "-o", "p", "--data", str(tmp_path / "long.npz")], "has texts of 600 tokens"),
        (
            ["validate", str(build)],
            f"workload.tokens: {MOST + 1} tokens are more than the {MOST} that the model has positions for",
        ),
        (["bench", str(build), "--shapes", "1x8,1x600"], f"shape 1x600: 600 tokens are more than the {MOST}"),
        (
            ["cost", str(build), "--data", str(tmp_path / "long.npz")],
            "long.npz: input 'input_ids' has texts of 600 tokens",
        ),
    ):
        done = CliRunner().invoke(app, words, env={"COLUMNS": "1000"})
        assert done.exit_code == 1 and says in " ".join(done.stderr.split()), done.output
        assert "Traceback" not in done.output and "ONNX Runtime" not in done.stderr


def test_a_workload_of_nothing_else(build: Path, tmp_path: Path) -> None:
    path = build.parent / "model/model.onnx"
    with pytest.raises(RecipeError, match=f"workload.tokens: 600 tokens are more than the {MOST}"):
        compile_model(path, {"passes": [], "workload": {"tokens": 600}}, tmp_path / "build")
    assert not (tmp_path / "build").exists()


def test_texts_are_cut_where_they_are_read(build: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("".join(f"w{i} {'w1 ' * 600}\n" for i in range(3)))
    profile = calibrate(open_source(build.parent / "model/model.onnx"), read_data(tmp_path / "long.txt"))
    assert profile.info.tokens == 3 * MOST
