"""Builds with routers: whole models, compiled, loaded, turned by their dial, and generating."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo
from rewrite import canonical
from routes import profile_with, random_routers
from seeds import seeded
from typer.testing import CliRunner

from trimtab.compiler import compile_model, load
from trimtab.compiler.cli.app import app
from trimtab.compiler.generation import generate
from trimtab.compiler.sources import open_source
from trimtab.compiler.targets.onnxruntime import OnnxRuntimeRunner
from trimtab.passes.errors import InputError, TrimtabError

WORKLOAD = {"batch": [1, 2, 4], "tokens": [1, 8, 32]}
RECIPE: dict[str, Any] = {"passes": [{"ffn-route": {"most": 1.0}}], "workload": WORKLOAD, "threads": 1}


def compiled(source: Path, folder: Path, family: str, **recipe: Any) -> Any:
    seed = int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    learned = random_routers(canonical(zoo.exported(family)), np.random.default_rng(seed), threshold=0.45)
    profile = profile_with(learned)
    profile.info = profile.info.model_copy(update={"model": open_source(source).fingerprint})
    return load(compile_model(source, RECIPE | recipe, folder / "build", profile=profile).path)


def test_an_encoder_turned_by_its_dial(tmp_path: Path) -> None:
    path = zoo.exported("bert")
    engine = compiled(path, tmp_path, "bert", passes=["unpad", *RECIPE["passes"]])
    (dial,) = engine.dials
    assert (dial.name, dial.default, dial.exact) == ("route_threshold", pytest.approx(0.45), 0)
    rng, dense = seeded(), OnnxRuntimeRunner(path)
    feeds = zoo.feeds("bert", 4, 17, rng)
    found = engine.run(feeds, speed=0)
    np.testing.assert_allclose(found["logits"], dense.run(feeds)["logits"], rtol=1e-4, atol=1e-4)
    mixed = engine.run(feeds, speed=[0.0, 0.3, 0.7, 1.0])["logits"]
    for place, speed in enumerate((0.0, 0.3, 0.7, 1.0)):
        alone = engine.run({name: value[place : place + 1] for name, value in feeds.items()}, speed=speed)["logits"]
        np.testing.assert_allclose(mixed[place], alone[0], rtol=1e-3, atol=1e-4)


def test_a_decoder_generates_at_its_dial(tmp_path: Path) -> None:
    source = zoo.save_pretrained("llama", tmp_path / "model")
    engine = compiled(source, tmp_path, "llama")
    prompts = [[5, 7, 11], [3, 4]]
    dense = OnnxRuntimeRunner(zoo.exported("llama", "cached"))
    wanted = list(generate(dense, prompts, max_new_tokens=6))
    exact = engine.manifest.all_dials.exact(2)
    found = list(generate(engine.runner, prompts, max_new_tokens=6, dials=exact))
    assert np.mean(np.array(found) == np.array(wanted)) > 0.5  # random weights: two tokens may be as likely
    fast = list(generate(engine.runner, prompts, max_new_tokens=6, dials=engine.manifest.all_dials.feeds(2, speed=1.0)))
    assert len(fast) == 6
    with pytest.raises(InputError, match="unknown dial"):
        engine.manifest.all_dials.feeds(2, {"route": 0.1})


@pytest.mark.parametrize(
    "step",
    [{"ffn-threshold": {"sparsity": 0.4, "most": 1.0}}, {"ffn-route": {"router": "fitted", "group": 4, "most": 1.0}}],
    ids=["threshold", "fitted"],
)
def test_a_model_that_nobody_trained(step: dict[str, Any], tmp_path: Path) -> None:
    """Measured by calibration, exact at speed 0, and of all samples each at its own speed."""
    source = zoo.save_pretrained("bert", tmp_path / "model")
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"w{i} w{i + 3} w{2 * i + 5} w9 w{i % 7 + 4}\n" for i in range(4, 40)), encoding="utf-8")
    built = compile_model(source, RECIPE | {"passes": ["unpad", step]}, tmp_path / "build", data=texts)
    engine, rng = load(built.path), seeded()
    (dial,), (name,) = engine.dials, step
    assert (dial.exact, dial.default) == (0, {"ffn-threshold": 0.4, "ffn-route": 0.5}[name])
    rows = {row["name"]: row for row in built.manifest.model_dump(mode="json")["passes"]}[name]["details"]["layers"]
    assert len(rows) == 3 and all(0.2 < row["sparsity"] < 0.8 and row["error"] < 1 for row in rows)
    feeds = zoo.feeds("bert", 3, 17, rng)
    dense = OnnxRuntimeRunner(zoo.exported("bert")).run(feeds)["logits"]
    np.testing.assert_allclose(engine.run(feeds, speed=0)["logits"], dense, rtol=1e-4, atol=1e-4)
    mixed = engine.run(feeds, speed=[0.0, 0.5, 1.0])["logits"]
    assert np.abs(mixed[1:] - dense[1:]).max() > 1e-3
    for place, speed in enumerate((0.0, 0.5, 1.0)):
        alone = engine.run({key: value[place : place + 1] for key, value in feeds.items()}, speed=speed)["logits"]
        np.testing.assert_allclose(mixed[place], alone[0], rtol=1e-3, atol=1e-4)


def test_a_profile_of_another_model(tmp_path: Path) -> None:
    profile = profile_with(random_routers(canonical(zoo.exported("bert")), np.random.default_rng(0)))
    with pytest.raises(TrimtabError, match="another model"):
        compile_model(zoo.exported("bert"), RECIPE, tmp_path / "build", profile=profile)
    with pytest.raises(TrimtabError, match="no weights learned by lte"):
        compile_model(zoo.exported("bert"), RECIPE, tmp_path / "build")


def test_the_command_line_knows_the_pass() -> None:
    shown = CliRunner().invoke(app, ["passes", "ffn-route"])
    assert shown.exit_code == 0
    assert "dense_above" in shown.output
