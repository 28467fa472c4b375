"""Recipes: what they mean, and that every mistake is refused with its place and the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from trimtab import passes
from trimtab.compiler.engine_options import MAX_THREADS
from trimtab.compiler.recipe import Recipe, load_recipe, override
from trimtab.compiler.schema import yaml_text
from trimtab.compiler.targets import get_target
from trimtab.compiler.workload import MAX_SIZE
from trimtab.passes.errors import RecipeError, TargetError


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
        (
            {"passes": [{"dampen": "a"}]},
            "passes[0].dampen: should be a mapping of options, not a; "
            "`trimtab passes NAME` lists the options of a pass",
        ),
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
        (b"threads: 2024-13-01\n", ["recipe.yaml, line 1", "'2024-13-01' is read as a timestamp"]),
        (b"threads: !!int four\n", ["recipe.yaml, line 1", "'four' is no int"]),
        (b"check: !!bool perhaps\n", ["recipe.yaml, line 1", "'perhaps' is no bool"]),
        (b"threads: !!float one\n", ["recipe.yaml, line 1", "'one' is no float"]),
        (b"threads: " + b"7" * 5000, ["recipe.yaml, line 1", "is no int"]),
        (b"passes: !!binary dGV4dA==\n", ["line 1", "is read as a binary"]),
        (b"passes: !!set {a, b}\n", ["line 1", "this is a set"]),
        (b"workload: !!map [batch, 1]\n", ["line 1", "this is no map"]),
        (b"workload: !!map batch\n", ["line 1", "this is no map"]),
        (b"passes: !!seq {dampen: 1}\n", ["line 1", "this is no seq"]),
        (b"threads: !!int [1]\n", ["line 1", "this is no int"]),
        (b"check: !!str {a: b}\n", ["line 1", "this is no str"]),
        (b"passes: &a [*a]\n", ["line 1", "holds itself"]),
        (b"<<: {threads: 1}\n", ["line 1", "merge"]),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: bytes, said: list[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    message = refused(path)
    for part in said:
        assert part in message


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("limit", ["bytes", "levels of nesting", "values", "values behind aliases"])
def test_a_recipe_has_limits(tmp_path: Path, limit: str, inside: bool) -> None:
    """Just inside them the value itself is refused, in a short message; just beyond, the limit."""
    more = int(not inside)
    text = {
        "bytes": "threads: 'x'".ljust(yaml_text.MAX_BYTES + more),
        "levels of nesting": "threads: "
        + "[" * (yaml_text.MAX_DEPTH - 1 + more)
        + "]" * (yaml_text.MAX_DEPTH - 1 + more),
        "values": f"threads: [{'1,' * (yaml_text.MAX_VALUES - 3 + more)}]",
        "values behind aliases": "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\nthreads: "
        f"[{'*a,' * ((yaml_text.MAX_VALUES - 14) // 10 + more)}]",
    }[limit]
    (tmp_path / "recipe.yaml").write_text(text)
    message = refused(tmp_path / "recipe.yaml")
    assert len(message) < 300
    if inside:
        assert "threads: should be a valid integer" in message
    else:
        said = {
            "bytes": "larger than 100000 bytes",
            "values behind aliases": "aliases stand for more than 10000 values",
        }
        assert said.get(limit, f"more than {yaml_text.MAX_DEPTH if 'levels' in limit else 10000} {limit}") in message


def test_many_faults_are_counted_and_ten_are_listed() -> None:
    message = refused({f"key{i}": i for i in range(25)})
    assert message.startswith("25 faults")
    assert message.endswith("and 15 more")
    assert message.count("unknown key") == 10


@pytest.mark.parametrize("name", ["a" * 5000, "ffn-splid" + "d" * 3000])
def test_long_names_are_cut(name: str) -> None:
    for recipe in ({"passes": [name]}, {name: 1}, {"target": name}, {"workload": {"dims": {name: [1, 2]}}}):
        if "target" in recipe:
            with pytest.raises(TargetError) as caught:
                get_target(name)
            message = str(caught.value)
        else:
            message = refused(recipe)
        assert len(message) < 1000


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"threads": MAX_THREADS + 1}, "threads"),
        ({"shards": 65}, "shards"),
        ({"calibration": {"seed": 1 << 63}}, "calibration.seed"),
        ({"workload": {"batch": MAX_SIZE + 1}}, "workload.batch"),
        ({"workload": {"dims": {"frames": [1, 1, MAX_SIZE + 1]}}}, "workload.dims.frames"),
        ({"workload": {"batch": [1, 1, 1 << 14], "tokens": [1, 1, 1025]}}, "16793600 tokens in a call"),
        ({"workload": {"past": [0, 0, 1 << 14], "tokens": 1, "batch": 1024}}, "16778240 tokens in a call"),
    ],
    ids=str,
)
def test_sizes_that_no_machine_has_are_refused(recipe: dict[str, Any], said: str) -> None:
    assert said in refused(recipe)


def test_the_largest_sizes_are_taken() -> None:
    load_recipe({"workload": {"batch": [1, 1, MAX_SIZE]}})  # of a model without tokens
    load_recipe({"threads": MAX_THREADS, "shards": 64, "calibration": {"seed": (1 << 63) - 1}})
    load_recipe({"workload": {"batch": [1, 1, 1 << 14], "tokens": [1, 1, 1024], "dims": {"frames": MAX_SIZE}}})


def test_a_missing_file(tmp_path: Path) -> None:
    assert "no such recipe" in refused(tmp_path / "none.yaml")


def test_settings_replace_values() -> None:
    recipe = load_recipe({"passes": ["dampen", "canonicalize", {"dampen": {"spare": 3}}]})
    changed = override(recipe, ["dampen.factor=0.25", "calibration.samples=7", "workload.batch=[1, 2, 3]", "threads=2"])
    assert [getattr(step, "factor", None) for step in changed.passes] == [0.25, None, 0.25]
    assert changed.passes[2] == tiny.Dampen(factor=0.25, spare=3)
    assert (changed.calibration.samples, changed.workload.batch, changed.threads) == (7, (1, 2, 3), 2)
    assert override(recipe, []) == recipe


def test_settings_replace_keys_of_an_option() -> None:
    recipe = load_recipe({"passes": ["dampen", {"dampen": {"budget": {"size": 0.5}}}]})
    changed = override(recipe, ["dampen.budget.size=0.125"])
    assert [getattr(step, "budget", None) for step in changed.passes] == [tiny.Budget(size=0.125)] * 2


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("dampen.factor", "pass.option=value"),
        ("dampen.budget.size", "pass.option=value"),
        ("dampen..size=1", "pass.option=value"),
        ("dampen.budget.size=2", "less than or equal to 1"),
        ("dampen.budget.seize=1", "'size'"),
        ("dampen.factor.size=1", "factor"),
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
