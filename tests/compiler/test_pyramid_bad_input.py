"""token-prune and early-exit on what cannot be: a clear refusal, or the answer that is right; as a user meets it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import heads
import numpy as np
import pytest
import zoo
from packed_encoder import exit_logits, exit_weights
from typer.testing import CliRunner

from trimtab.compiler import compile_model, load
from trimtab.compiler.cli.app import app
from trimtab.compiler.engine import Engine
from trimtab.compiler.sources import open_source
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner
from trimtab.passes.errors import InputError, TrimtabError
from trimtab.passes.profile import Profile, ProfileInfo

SEED = int(np.random.default_rng().integers(1 << 30))
WIDTH, CLASSES, LAYERS, LONGEST = 32, 3, 2, heads.TEXT
WORKLOAD = {"batch": [1, 2, 4], "tokens": [1, 8, LONGEST]}


def weights(exits: tuple[int, ...] = (0, 1), thresholds: Any = (0.05, 0.1)) -> dict[str, np.ndarray]:
    """What training would have learned; without thresholds where they are None."""
    rng = np.random.default_rng(SEED)
    made = {} if thresholds is None else {"thresholds": np.array(thresholds, np.float32)}
    for after in exits:
        made |= exit_weights(rng, after, "light", WIDTH, CLASSES)
    return made


def profile(path: Path, learned: Mapping[str, np.ndarray]) -> Profile:
    info = ProfileInfo(model=open_source(path).fingerprint, data="d", samples=1, tokens=1)
    return Profile(info, {f"learned.magic-pyramid.{name}": value for name, value in learned.items()})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ONNX files: a classifier of two layers, the same with one layer and another seed, a regression of one and of
    several scores, and a classifier of any number of labels.
    """
    print(f"seed {SEED}")
    folder = tmp_path_factory.mktemp("models")
    kinds: dict[str, dict[str, Any]] = {
        "classes": {"num_labels": CLASSES},
        "shallow": {"num_labels": CLASSES, "num_hidden_layers": 1},
        "regression": {"num_labels": 1, "problem_type": "regression"},
        "scores": {"num_labels": CLASSES, "problem_type": "regression"},
        "labels": {"num_labels": CLASSES, "problem_type": "multi_label_classification"},
    }
    made = {
        name: heads.save_onnx(heads.head_model("bert", 7, **config), folder / name) for name, config in kinds.items()
    }
    return made | {"generation": zoo.exported("gpt2")}


PASSES = ["unpad", "token-prune", "early-exit"]
NAN = float("nan")


@pytest.mark.parametrize(
    ("model", "passes", "learned", "says"),
    [
        ("classes", PASSES, weights((0, 1, 5)), "an exit behind 5 layers of a model in which 2 layers were found"),
        ("classes", PASSES, weights((2,)), "an exit behind 2 layers of a model in which 2 layers were found"),
        ("shallow", ["unpad", "early-exit"], weights((0, 1)), "exits can be behind 0 to 0 layers"),
        ("classes", ["unpad", {"early-exit": {"after": [9]}}], weights(), "no exit behind 9 layers"),
        ("classes", ["unpad", {"early-exit": {"after": [-1]}}], weights(), "no exit behind -1 layers"),
        ("classes", PASSES, weights(()), "the profile has no exits"),
        ("classes", PASSES, weights(thresholds=None), "no thresholds learned"),
        ("classes", PASSES, None, "no thresholds learned"),
        ("classes", ["unpad", "early-exit"], None, "no weights learned by magic-pyramid"),
        ("classes", PASSES, weights(thresholds=(0, 0.1, 0.1)), "3 thresholds were learned, and the model has 2 layers"),
        ("regression", ["unpad", "early-exit"], weights(), "two classes or more"),
        ("scores", ["unpad", "early-exit"], weights(), "this model gives a score"),
        ("labels", ["unpad", "early-exit"], weights(), "this model gives a sample any number of labels"),
        ("generation", ["unpad", "early-exit"], weights(), "an answer for each token"),
        ("generation", ["unpad", {"token-prune": {"keep": [0.5]}}], None, "keys are hidden by position"),
        ("classes", ["unpad", {"token-prune": {"keep": [0.5] * 3}}], None, "3 shares are given"),
        ("classes", ["unpad", {"token-prune": {"keep": []}}], None, "at least 1 item"),
        ("classes", ["unpad", {"token-prune": {"keep": [0.0]}}], None, "0 is no share"),
        ("classes", ["unpad", {"token-prune": {"keep": [NAN]}}], None, "keep[0]: should be a finite number, not nan"),
        (
            "classes",
            ["unpad", {"token-prune": {"strength": NAN}}],
            weights(),
            "strength: should be a finite number, not nan",
        ),
        ("classes", ["unpad", {"early-exit": {"threshold": 1.5}}], weights(), "threshold"),
        ("classes", ["token-prune", "early-exit"], weights(), "put unpad in front of token-prune"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:50],
)
def test_refused(models: dict[str, Path], model: str, passes: Any, learned: Any, says: str, tmp_path: Path) -> None:
    """By the command, in one message, and nothing is written."""
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"passes": passes, "workload": WORKLOAD, "threads": 1}).replace("NaN", ".nan"))
    words = ["compile", str(models[model]), str(recipe), "-o", str(tmp_path / "build")]
    if learned is not None:
        profile(models[model], learned).save(tmp_path / "profile.safetensors")
        words += ["--profile", str(tmp_path / "profile.safetensors")]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "1000"})
    assert done.exit_code == 1 and says in " ".join(done.stderr.split()), done.stderr
    assert "Traceback" not in done.output and not (tmp_path / "build").exists()


def test_one_layer(models: dict[str, Path], tmp_path: Path) -> None:
    """It has one place for an exit, in front of its layer, and one for pruning."""
    path = models["shallow"]
    recipe = {"passes": PASSES, "workload": WORKLOAD, "threads": 1}
    out = tmp_path / "build"
    engine = load(compile_model(path, recipe, out, profile=profile(path, weights((0,), (0.2,)))).path)
    feeds = heads.feeds(np.random.default_rng(SEED), 3, 12)
    wanted = OnnxRuntimeRunner(path).run(feeds)["logits"]
    np.testing.assert_allclose(engine.run(feeds, speed=0)["logits"], wanted, rtol=1e-4, atol=1e-4)
    assert [engine.run(feeds, speed=speed)["exit_layer"].tolist() for speed in (0, 1)] == [[1] * 3, [0] * 3]


def test_a_profile_of_another_model(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"passes": PASSES}))
    profile(models["classes"], weights((0,), (0.1,))).save(tmp_path / "p.safetensors")
    words = ["compile", models["shallow"], recipe, "-o", tmp_path / "build", "--profile", tmp_path / "p.safetensors"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 1 and "belongs to another model" in " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def engine(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Engine:
    out = tmp_path_factory.mktemp("build") / "build"
    recipe = {"passes": PASSES, "workload": WORKLOAD, "threads": 1}
    return load(compile_model(models["classes"], recipe, out, profile=profile(models["classes"], weights())).path)


@pytest.mark.parametrize("speed", [0.0, 0.5, 1.0])
def test_no_samples(engine: Engine, speed: float) -> None:
    found = engine.run(heads.feeds(np.random.default_rng(SEED), 0, 9), speed=speed)
    assert found["logits"].shape == (0, CLASSES) and found["exit_layer"].shape == (0,)


@pytest.mark.parametrize("tokens", [1, 2, LONGEST])
def test_short_and_longest_samples(engine: Engine, models: dict[str, Path], tokens: int) -> None:
    """One without a token is finite, disturbs nobody, and may be alone."""
    rng = np.random.default_rng(SEED)
    feeds = heads.feeds(rng, 4, tokens)
    feeds["attention_mask"][:] = 1
    feeds["attention_mask"][2] = 0
    wanted = OnnxRuntimeRunner(models["classes"]).run(feeds)["logits"]
    real = [0, 1, 3]
    exact = engine.run(feeds, speed=0)["logits"]
    np.testing.assert_allclose(exact[real], wanted[real], rtol=1e-4, atol=1e-4)
    for speed in (0.0, 0.5, 1.0):
        together = engine.run(feeds, speed=speed)
        others = engine.run({name: value[real] for name, value in feeds.items()}, speed=speed)
        alone = engine.run({name: value[2:3] for name, value in feeds.items()}, speed=speed)
        np.testing.assert_allclose(together["logits"][real], others["logits"], rtol=1e-4, atol=1e-4)
        assert np.isfinite(together["logits"]).all() and alone["logits"].shape == (1, CLASSES)
    if tokens == LONGEST:
        with pytest.raises(TrimtabError):
            engine.run({name: np.repeat(value, 2, 1) for name, value in feeds.items()})


def test_all_leave_at_once(engine: Engine) -> None:
    feeds = heads.feeds(np.random.default_rng(SEED), 5, 12)
    found = engine.run(feeds, dials={"exit_threshold": 1.0})
    assert found["exit_layer"].tolist() == [0] * 5 and np.isfinite(found["logits"]).all()


def test_no_token_reaches_the_threshold(models: dict[str, Path], tmp_path: Path) -> None:
    """[CLS] and the best other token stay, and so a sample of two tokens is as it was."""
    learned = weights((1,), (1.0, 1.0))
    recipe = {"passes": PASSES, "workload": WORKLOAD, "threads": 1}
    path = models["classes"]
    engine = load(compile_model(path, recipe, tmp_path / "build", profile=profile(path, learned)).path)
    feeds = heads.feeds(np.random.default_rng(SEED), 4, 11)
    pruned = engine.run(feeds, dials={"prune": 4.0, "exit_threshold": 1.0})["logits"]  # read behind the first layer
    two = {name: value[:, :2].copy() for name, value in feeds.items()}
    two["attention_mask"][:] = 1
    exact, hard = (engine.run(two, dials={"prune": dial, "exit_threshold": 0})["logits"] for dial in (0, 4.0))
    np.testing.assert_allclose(hard, exact, rtol=1e-4, atol=1e-4)
    for row, length in enumerate(feeds["attention_mask"].sum(1)):
        states = first_layer(path, {name: value[row : row + 1, :length] for name, value in feeds.items()})
        answers = [exit_logits(learned, states[[0, best]], 1, "light") for best in range(1, length)] or [
            exit_logits(learned, states[:1], 1, "light")
        ]
        assert min(float(np.abs(answer - pruned[row]).max()) for answer in answers) < 1e-3


def first_layer(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """States [tokens, width] behind the first layer of one sample."""
    import onnx
    import onnxruntime as ort

    model = onnx.load(path)
    (norm,) = [node for node in model.graph.node if "layer.0/output/LayerNorm" in node.name]
    model.graph.output.append(onnx.helper.make_tensor_value_info(norm.output[0], onnx.TensorProto.FLOAT, None))
    states: np.ndarray = ort.InferenceSession(model.SerializeToString()).run([norm.output[0]], feeds)[0][0]
    return states


@pytest.mark.parametrize(
    ("turned", "says"),
    [
        ({"dials": {"prune": NAN}}, "dial 'prune' is nan; give a number from 0 to 4"),
        ({"dials": {"prune": 4.5}}, "dial 'prune' is 4.5"),
        ({"dials": {"exit_threshold": [0.1, -0.1]}}, "dial 'exit_threshold' is -0.1"),
        ({"dials": {"exit": 0.1}}, "unknown dial 'exit'"),
        ({"speed": [0.5, NAN]}, "speed is nan"),
    ],
    ids=str,
)
def test_dials_that_cannot_be(engine: Engine, turned: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as error:
        engine.run(heads.feeds(np.random.default_rng(SEED), 2, 5), **turned)
    assert says in f"{error.value.message}; {error.value.hint}"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("validate", "--dial", "prune=nan"), "dial 'prune' is nan"),
        (("bench", "--dial", "exit_threshold=1.1"), "dial 'exit_threshold' is"),
        (("bench", "--speed", "nan"), "speed is nan"),
    ],
    ids=str,
)
def test_commands_refuse_dials(engine: Engine, words: tuple[str, ...], says: str) -> None:
    command, *options = words
    done = CliRunner().invoke(app, [command, str(engine.path), *options])
    assert done.exit_code == 1 and says in " ".join(done.stderr.split()) and "Traceback" not in done.output
