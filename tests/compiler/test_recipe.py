"""Recipes: what they mean, and that every mistake is refused with its place and the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from trimtab import passes
from trimtab.compiler.recipe import Recipe, load_recipe, override
from trimtab.passes.errors import RecipeError


@pytest.fixture(autouse=True)
def _dampen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(passes._PASSES, "dampen", tiny.PASS)


def refused(recipe: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    return str(caught.value)


def test_a_recipe_is_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "passes: [canonicalize, {dampen: {factor: 5e-1}}]\n"
        "target: tensorrt-rtx\nworkload: {batch: [1, 4, 8], tokens: 32}\ncalibration: {samples: 64}\nthreads: 2\n"
    )
    recipe = load_recipe(path)
    assert [step.name for step in recipe.passes] == ["canonicalize", "dampen"]
    assert recipe.passes[1] == tiny.Dampen(factor=0.5)
    assert (recipe.target, recipe.threads, recipe.calibration.samples) == ("tensorrt-rtx", 2, 64)
    assert (recipe.workload.batch, recipe.workload.tokens) == ((1, 4, 8), (32, 32, 32))
    assert recipe.calibration.batch_size == 16


def test_the_same_recipe_written_otherwise_is_the_same(tmp_path: Path) -> None:
    short = load_recipe({"passes": ["dampen"]})
    long = load_recipe({"passes": [{"dampen": {"factor": 1.0, "spare": None}}], "threads": None, "workload": {}})
    assert short == long
    assert short.canonical() == long.canonical()
    assert short.canonical() != load_recipe({"passes": [{"dampen": {"factor": 0.5}}]}).canonical()


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    recipe = load_recipe(
        {"passes": [{"dampen": {"budget": {"size": 0.5}}}], "workload": {"dims": {"frames": [1, 2, 3]}}}
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_no_passes_is_a_recipe() -> None:
    assert load_recipe({"passes": []}).passes == ()


def test_the_default_splits_ffns() -> None:
    assert [step.name for step in load_recipe(None).passes] == ["ffn-split"]


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"passess": []}, ["passess: unknown key", "'passes'"]),
        ({"passes": ["canonicalize", {"dampen": {"facotr": 1}}]}, ["passes[1].dampen.facotr: unknown key", "'factor'"]),
        ({"passes": [{"dampen": {"budget": {"sise": 1}}}]}, ["passes[0].dampen.budget.sise", "'size'"]),
        ({"passes": ["ffn-splt"]}, ["passes[0]", "'ffn-splt'", "'ffn-split'"]),
        ({"passes": [{"dampen": {"factor": 2.5}}]}, ["passes[0].dampen.factor", "less than or equal to 2", "2.5"]),
        ({"passes": [{"dampen": {"budget": {"size": 0}}}]}, ["passes[0].dampen.budget.size", "greater than 0"]),
        ({"passes": "dampen"}, ["passes: should be a list"]),
        ({"passes": [{"dampen": {}, "canonicalize": {}}]}, ["passes[0]: should be a pass name"]),
        ({"passes": [{"dampen": [1]}]}, ["passes[0].dampen: should be a mapping"]),
        ({"passes": [3]}, ["passes[0]", "3"]),
        ({"calibration": {"sample": 4}}, ["calibration.sample: unknown key", "'samples'"]),
        ({"calibration": {"samples": 0}}, ["calibration.samples", "greater than or equal to 1", "0"]),
        ({"calibration": {"samples": True}}, ["calibration.samples", "valid integer", "not true"]),
        ({"calibration": None}, ["calibration: should be a mapping, not null"]),
        ({"threads": 0}, ["threads", "greater than or equal to 1"]),
        ({"threads": 1.5}, ["threads", "valid integer"]),
        ({"target": 4}, ["target", "valid string"]),
        ({"check": "yes"}, ["check", "valid boolean"]),
        ({"workload": {"token": 3}}, ["workload.token: unknown key", "'tokens'"]),
        ({"workload": {"batch": [4, 2, 1]}}, ["workload.batch", "min <= opt <= max"]),
        ({"workload": {"batch": [1, 2]}}, ["workload.batch[2]", "required"]),
        ({"threads": 0, "targt": 1}, ["2 faults", "threads:", "targt:"]),
    ],
)
def test_mistakes_are_named(recipe: dict[str, Any], said: list[str]) -> None:
    message = refused(recipe)
    for part in said:
        assert part in message


NAN = float("nan")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"threads": {"a": [1, None]}}, "threads: should be a valid integer, not {a: [1, null]}"),
        ({"calibration": {"samples": "4"}}, "calibration.samples: should be a valid integer, not '4'"),
        ({"passes": {"dampen": {}}}, "passes: should be a list, not {dampen: {}}; such as `passes: [ffn-split]`"),
        ({"passes": [{"dampen": "a"}]}, "passes[0].dampen: should be a mapping of options, not a"),
        ({"workload": {"batch": "a"}}, "workload.batch: should be a list, not a"),
        ({"engine": [1]}, "engine: should be a mapping, not [1]"),
        ({"engine": {"timeout_s": NAN}}, "engine.timeout_s: should be a finite number, not nan"),
        ({"passes": [{"dampen": {"factor": NAN}}]}, "passes[0].dampen.factor: should be a finite number, not nan"),
        ({"passes": [{"dampen": {"factor": "nan"}}]}, "passes[0].dampen.factor: should be a finite number, not nan"),
        ({"passes": [{"dampen": {"factor": "-inf"}}]}, "passes[0].dampen.factor: should be a finite number, not -inf"),
        (
            {"passes": ["unpad", {"token-prune": {"keep": [NAN]}}]},
            "passes[1].token-prune.keep[0]: should be a finite number, not nan",
        ),
        (
            {"passes": ["unpad", {"token-prune": {"keep": []}}]},
            "passes[1].token-prune.keep: should have at least 1 item, not []",
        ),
        (
            {"passes": [{"ffn-split": {"budget": {"size": 0.5, "time": 0.5}}}]},
            "passes[0].ffn-split.budget: a budget is one of size, time and error",
        ),
        (
            {"passes": [{"ffn-topk": {"density": 0.5, "take": 0.2}}]},
            "passes[0].ffn-topk: take: 0.2 computes fewer neurons than density 0.5 wants",
        ),
        ({"target": list(range(99))}, f"target: should be a valid string, not {str(list(range(99)))[:57]}..."),
    ],
    ids=str,
)
def test_a_wrong_value_is_shown_as_it_was_written_and_short(recipe: dict[str, Any], message: str) -> None:
    assert refused(recipe) == message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"threads: 1\nthreads: 2\n", ["recipe.yaml, line 2", "'threads' is given twice"]),
        (b"passes:\n- dampen: {factor: 1, factor: 2}\n", ["line 2", "'factor' is given twice"]),
        (b"passes: [dampen\nthreads: 1\n", ["recipe.yaml, line 2"]),
        (b"", ["recipe.yaml", "empty"]),
        (b"- dampen\n", ["recipe.yaml", "list"]),
        (b"1: 2\n", ["line 1", "key 1 is no string"]),
        (b"threads: \xff\n", ["recipe.yaml", "UTF-8"]),
        (b"threads: !!python/object/apply:os.system [ls]\n", ["recipe.yaml, line 1"]),
        (b"treads: 2\n", ["recipe.yaml: treads", "'threads'"]),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: bytes, said: list[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    message = refused(path)
    for part in said:
        assert part in message


def test_a_missing_file(tmp_path: Path) -> None:
    assert "no such recipe" in refused(tmp_path / "none.yaml")


def test_settings_replace_values() -> None:
    recipe = load_recipe({"passes": ["dampen", "canonicalize", {"dampen": {"spare": 3}}]})
    changed = override(recipe, ["dampen.factor=0.25", "calibration.samples=7", "workload.batch=[1, 2, 3]", "threads=2"])
    assert [getattr(step, "factor", None) for step in changed.passes] == [0.25, None, 0.25]
    assert changed.passes[2] == tiny.Dampen(factor=0.25, spare=3)
    assert (changed.calibration.samples, changed.workload.batch, changed.threads) == (7, (1, 2, 3), 2)
    assert override(recipe, []) == recipe


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("dampen.factor", "pass.option=value"),
        ("dampen.budget.size=1", "pass.option=value"),
        ("dampn.factor=1", "'dampen'"),
        ("dampen.factr=1", "'factor'"),
        ("dampen.factor=9", "less than or equal to 2"),
        ("treads=9", "'threads'"),
        ("threads=[", "line 1"),
    ],
)
def test_settings_that_cannot_be(setting: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        override(Recipe(passes=[tiny.Dampen()]), [setting])  # type: ignore[arg-type]
    assert said in str(caught.value)


@pytest.mark.parametrize("later", ["precision", "dynamic-int8"])
def test_passes_that_cannot_follow_are_refused_when_the_recipe_is_read(later: str) -> None:
    with pytest.raises(
        RecipeError, match=rf"passes\[1\]: {later} cannot run behind precision: .*float16.*; put precision"
    ):
        load_recipe({"passes": ["precision", later]})
    load_recipe({"passes": [{"precision": {"type": "float32"}}, later]})
    load_recipe({"passes": ["dynamic-int8", "precision"]})
