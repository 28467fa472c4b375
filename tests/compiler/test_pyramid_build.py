"""Builds that prune tokens and exit early: whole models, compiled, loaded and turned by their dials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo
from packed_encoder import exit_weights

from trimtab.compiler import compile_model, load
from trimtab.compiler.engine import Engine
from trimtab.compiler.sources import open_source
from trimtab.compiler.targets.onnxruntime import OnnxRuntimeRunner
from trimtab.passes.profile import Profile, ProfileInfo

WORKLOAD = {"batch": [1, 4, 8], "tokens": [1, 16, 48]}
FAMILIES = {"bert": (3, 48, 3), "roberta": (2, 40, 5)}
"""Classifier → its layers, width and classes."""

HEADS = {"bert": "light", "roberta": "fastbert"}


def profile_of(path: Path, family: str, rng: np.random.Generator) -> Profile:
    """Random thresholds and exits, as training would have learned them."""
    layers, width, classes = FAMILIES[family]
    learned = {"thresholds": rng.uniform(0.02, 0.2, layers).astype(np.float32)}
    for after in range(layers):
        learned |= exit_weights(rng, after, HEADS[family], width, classes)
    info = ProfileInfo(model=open_source(path).fingerprint, data="d", samples=1, tokens=1)
    return Profile(info, {f"learned.magic-pyramid.{name}": value for name, value in learned.items()})


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family, its dense model, and a build of it."""
    seed = int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    family, rng = request.param, np.random.default_rng(seed)
    path = zoo.exported(family)
    passes = ["unpad", "token-prune", {"early-exit": {"threshold": 0.5}}]
    recipe = {"passes": passes, "workload": WORKLOAD, "threads": 1}
    out = tmp_path_factory.mktemp("pyramid") / "build"
    build = compile_model(path, recipe, out, profile=profile_of(path, family, rng))
    return family, OnnxRuntimeRunner(path), load(build.path), rng


def test_the_exact_end_is_the_dense_model(made: Any) -> None:
    family, dense, engine, rng = made
    for batch, tokens in ((1, 1), (1, 17), (5, 33), (8, 48)):
        feeds = zoo.feeds(family, batch, tokens, rng)
        found = engine.run(feeds, speed=0)
        np.testing.assert_allclose(found["logits"], dense.run(feeds)["logits"], rtol=1e-4, atol=1e-4)
        assert found["exit_layer"].tolist() == [FAMILIES[family][0]] * batch


@pytest.mark.parametrize("speed", [0.25, 0.5, 1.0])
def test_company_changes_nothing(made: Any, speed: float) -> None:
    """Each sample alone, without padding, gets what it gets in a padded batch, whoever else leaves."""
    family, _, engine, rng = made
    feeds = zoo.feeds(family, 8, 40, rng)
    together = engine.run(feeds, speed=speed)
    lengths = feeds["attention_mask"].sum(1)
    alike = 0
    for row in range(8):
        own = {name: array[row : row + 1, : lengths[row]] for name, array in feeds.items()}
        alone = engine.run(own, speed=speed)
        # A doubt, or what a token receives, may lie at the threshold up to rounding; that is rare.
        alike += np.allclose(alone["logits"], together["logits"][row : row + 1], rtol=1e-3, atol=1e-3)
    assert alike >= 7


def test_samples_of_one_batch_at_their_own_speed(made: Any) -> None:
    family, _, engine, rng = made
    feeds = zoo.feeds(family, 4, 20, rng)
    mixed = engine.run(feeds, speed=[0.0, 1.0, 0.0, 1.0])
    slow, fast = engine.run(feeds, speed=0.0), engine.run(feeds, speed=1.0)
    np.testing.assert_allclose(mixed["logits"][[0, 2]], slow["logits"][[0, 2]], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(mixed["logits"][[1, 3]], fast["logits"][[1, 3]], rtol=1e-3, atol=1e-3)
    assert mixed["exit_layer"][[0, 2]].tolist() == [FAMILIES[family][0]] * 2
    assert fast["exit_layer"].tolist() == [0] * 4  # nobody doubts more than entirely


def test_what_a_build_lists(made: Any) -> None:
    engine: Engine = made[2]
    assert [dial.name for dial in engine.dials] == ["prune", "exit_threshold"]
    assert [tensor.name for tensor in engine.outputs] == ["logits", "exit_layer"]
    assert engine.manifest.task is not None and engine.manifest.task.kind == "classes"
