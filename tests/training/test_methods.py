"""The table of training methods: what is listed, which options belong to which, and what is refused before any work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click import unstyle
from typer.testing import CliRunner, Result

from trimtab.compiler import sources
from trimtab.compiler.cli.app import app
from trimtab.passes.errors import BuildError, ModelError, RecipeError, TrimtabError
from trimtab.training import METHOD_NAMES, trainer_class
from trimtab.training.run import train

PLANS = {"recover": "passes: [recover]\n", "topk": "passes: [ffn-topk]\n"}


@pytest.fixture(autouse=True)
def _nothing_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A recipe, texts and what looks like a model; whatever opens it has begun too early."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "open_source", lambda *_, **__: pytest.fail("it opened the model"))
    Path("texts.txt").write_text("w4 w5\nw6 w7\n")
    Path("model").mkdir()
    (Path("model") / "config.json").write_text("{}")
    for method, plan in PLANS.items():
        Path(f"{method}.yaml").write_text(plan)


def trimtab(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})


def run(method: str, *words: str, recipe: bool = True) -> Result:
    plan = (f"{method}.yaml",) if recipe and method in PLANS else ()
    return trimtab("train", "model", "--method", method, "--data", "texts.txt", "-o", "out", *plan, *words)


def test_all_methods_are_listed() -> None:
    rows = trimtab("methods").stdout.splitlines()
    assert [row.split()[0] for row in rows] == ["method", *METHOD_NAMES]
    listed = json.loads(trimtab("methods", "--json").stdout)
    assert [row["name"] for row in listed] == list(METHOD_NAMES)
    for row in listed:
        assert all(option["description"].endswith(".") for option in row["options"]["properties"].values())
        assert {"minutes", "steps", "lr", "seed"} <= row["options"]["properties"].keys()
    one = trimtab("methods", "topk").stdout
    assert "ramp" in one and "labels_weight" not in one
    wrong = trimtab("methods", "topkk")
    assert wrong.exit_code == 1 and "did you mean 'topk'?" in wrong.stderr


def test_help_says_whose_each_option_is() -> None:
    text = squeezed(unstyle(trimtab("train", "--help").stdout))
    for method in METHOD_NAMES:
        assert squeezed(f"{method}: {trainer_class(method).summary}") in text
        for name, field in trainer_class(method).settings_class.model_fields.items():
            having = [each for each in METHOD_NAMES if name in trainer_class(each).settings_class.model_fields]
            of = "" if len(having) == len(METHOD_NAMES) else f"{', '.join(having)}: "
            option, switch = name.replace("_", "-"), field.annotation is bool
            start = text.index(f"--{option}/--no-{option}" if switch else f"--{option}<")
            assert squeezed(f"{'' if switch else '>'}{of}{field.description}") in text[start : start + 400]
    assert squeezed("Default: recover 5e-05, topk 0.0005") in text


def squeezed(text: str) -> str:
    """Without blanks, since help is wrapped, behind hyphens too."""
    return "".join(text.split())


def test_settings_of_several_methods_have_one_type() -> None:
    types: dict[str, Any] = {}
    for method in METHOD_NAMES:
        for name, field in trainer_class(method).settings_class.model_fields.items():
            assert types.setdefault(name, field.annotation) == field.annotation


@pytest.mark.parametrize(
    ("method", "words", "says"),
    [
        ("topk", ("--train", "ffn"), "--train belongs to --method recover, and not to topk"),
        ("topk", ("--no-entrance",), "--entrance belongs to --method magic-pyramid, and not to topk"),
        ("topk", ("--labels-weight", "0"), "--labels-weight belongs to --method recover"),
        ("topk", ("--profile", "texts.txt"), "--method topk takes no Profile"),
        ("recover", ("--ramp", "0.5"), "--ramp belongs to --method topk, and not to recover"),
        ("recover", ("--temperature", "0"), "temperature: should be greater than 0"),
        ("recover", ("--lr", "nan"), "Invalid value for '--lr'"),
        ("topk", ("--set", "recover.x=1"), "the recipe has no such pass or section"),
    ],
)
def test_an_option_that_does_not_fit_is_one_message(method: str, words: tuple[str, ...], says: str) -> None:
    done = run(method, *words)
    assert done.exit_code in (1, 2)
    assert says in done.stderr
    assert not Path("out").exists()


@pytest.mark.parametrize("method", PLANS)
def test_a_recipe_is_asked_for(method: str) -> None:
    for words in ((), ("--set", "threads=1")):
        done = run(method, *words, recipe=False)
        assert done.exit_code == 1
        assert f"--method {method} needs the recipe" in done.stderr


def test_bounds_that_exclude_nothing_are_the_command_lines_too() -> None:
    for words in (("--batch-size", "0"), ("--minutes", "-1"), ("--train", "some"), ("--method", "none")):
        done = run("recover", *words)
        assert done.exit_code == 2
        assert words[0] in unstyle(done.stderr)


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"method": "recoverr"}, TrimtabError, "did you mean 'recover'"),
        ({"settings": {"ramp": 2}}, RecipeError, r"topk\.ramp: should be less than or equal to 1, not 2"),
        ({"settings": {"rampp": 0.2}}, RecipeError, "did you mean 'ramp'"),
        ({"settings": {"labels_weight": 1.0}}, RecipeError, "unknown key"),
        ({"recipe": None}, RecipeError, "needs the recipe"),
        ({"recipe": "recover.yaml"}, RecipeError, "no pass 'ffn-topk'"),
        ({"model": "texts.txt"}, ModelError, "no Hugging Face directory"),
        ({"out": "model"}, BuildError, "model: exists already"),
    ],
)
def test_python_callers_are_told_alike(change: dict[str, Any], kind: type[TrimtabError], says: str) -> None:
    given: dict[str, Any] = {"method": "topk", "model": "model", "data": "texts.txt", "out": "out"}
    with pytest.raises(kind, match=says):
        train(**given | {"recipe": "topk.yaml"} | change)


def test_listing_methods_needs_no_torch() -> None:
    code = "import sys, trimtab.compiler.cli.train as t; t._help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
