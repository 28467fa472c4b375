"""One word for one option in all commands, old spellings that still work, and the tables of options."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny
from pydantic import BaseModel, Field
from typer.testing import CliRunner, Result

from trimtab.compiler.cli.app import COMMANDS, app, load
from trimtab.compiler.cli.renamed import ARGUMENT, RENAMED, with_new_names
from trimtab.compiler.cli.schema import option_rows
from trimtab.passes.profile import Profile


def parameters(command: str) -> list[Any]:
    return list(load(command).params)


def trimtab(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def test_an_option_of_several_commands_has_one_type_and_one_short_form() -> None:
    kinds: dict[str, set[tuple[str, bool, tuple[str, ...]]]] = {}
    for command in COMMANDS:
        for each in parameters(command):
            if each.param_type_name == "option" and each.name != "help":
                form = (
                    str(each.type_descriptor.annotation),
                    each.multiple,
                    tuple(sorted(each.opts + each.secondary_opts)),
                )
                kinds.setdefault(each.name, set()).add(form)
    assert {name: forms for name, forms in kinds.items() if len(forms) > 1} == {}


@pytest.mark.parametrize("command", COMMANDS)
def test_results_go_to_output_and_recipes_are_arguments(command: str) -> None:
    options = {name for each in parameters(command) if each.param_type_name == "option" for name in each.opts}
    assert not options & {"--out", "--recipe", "--batch", *RENAMED.get(command, {})}
    assert ("--output" in options) == ("-o" in options)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_a_sentence_with_a_subject(command: str) -> None:
    """No help text begins in the middle ("Of the draws."), and each ends with a full stop."""
    for each in parameters(command):
        text = each.help or ""
        shown = text.split(": ", 1)[1] if command == "train" and text.split(": ")[0].islower() else text
        assert shown and not shown.startswith(("Of ", "What ", "As ", "It ")), f"{each.name}: {text}"
        assert re.fullmatch(r".*\.( \[[x<>0-9.]+\])?", text), f"{each.name}: {text}"


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        ("compile", ["m", "--out", "b"], ["m", "--output", "b"]),
        ("compile", ["m", "--out=b", "r.yaml"], ["m", "--output=b", "r.yaml"]),
        ("train", ["--recipe", "r.yaml", "m", "--seed", "1"], ["m", "--seed", "1", "r.yaml"]),
        ("calibrate", ["--recipe=r.yaml", "m"], ["m", "r.yaml"]),
        ("calibrate", ["m", "--recipe", "r.yaml", "--", "-x"], ["m", "--", "-x", "r.yaml"]),
        ("cost", ["b", "--speed", "0,1", "--batch", "4"], ["b", "--speeds", "0,1", "--batch-size", "4"]),
        ("generate", ["b", "--max-tokens", "4"], ["b", "--max-new-tokens", "4"]),
    ],
)
def test_old_spellings(command: str, old: list[str], new: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert with_new_names(command, old) == new
    warnings = capsys.readouterr().err.splitlines()
    assert warnings and all(line.startswith("warning: --") and "deprecated" in line for line in warnings)
    assert with_new_names(command, new) == new
    assert capsys.readouterr().err == ""


def test_old_spellings_are_no_options_any_more() -> None:
    for command, names in RENAMED.items():
        known = {name for each in parameters(command) for name in each.opts}
        assert not known & set(names)
        assert set(names.values()) - {ARGUMENT} <= known


def test_an_old_command_line_works(tmp_path: Path) -> None:
    model, data = tiny.model(tmp_path / "m.onnx"), tiny.data(tmp_path / "d.npz")
    (tmp_path / "r.yaml").write_text("passes: [ffn-split]\n")
    done = trimtab("calibrate", model, "--recipe", tmp_path / "r.yaml", "--data", data, "-o", tmp_path / "p")
    assert done.exit_code == 0, done.output
    assert done.stderr.count("deprecated") == 1 and "deprecated" not in done.stdout
    assert Profile.load(tmp_path / "p").tensors
    done = trimtab(
        "compile", model, tmp_path / "r.yaml", "--out", tmp_path / "b", "--profile", tmp_path / "p", "--json"
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["manifest_sha256"]


class Inner(BaseModel):
    share: float | None = Field(None, gt=0, lt=1, description="a share")


class Outer(BaseModel):
    name: str
    cut: float = Field(0.5, gt=0, le=1, description="a cut")
    least: int = Field(3, gt=2)
    most: float | None = Field(None, lt=0.25)
    even: int = Field(4, ge=2, multiple_of=2)
    kind: Literal["a", "b"] | None = None
    inner: Inner | None = None
    each: dict[str, float] = Field(default_factory=dict)
    pair: tuple[int, float] = (1, 2.0)
    layers: list[int] | None = None
    on: bool = True


def test_options_show_bounds_nested_keys_and_containers_as_they_are() -> None:
    rows = {name: (values, default, meaning) for name, values, default, meaning in option_rows(Outer)}
    assert rows == {
        "name": ("string", "(required)", ""), "cut": ("number 0<x<=1", "0.5", "a cut"),
        "least": ("integer x>2", "3", ""), "most": ("number x<0.25|null", "null", ""),
        "even": ("integer x>=2 multiple of 2", "4", ""), "kind": ("a|b|null", "null", ""),
        "inner": ("mapping|null", "null", ""), "inner.share": ("number 0<x<1|null", "null", "a share"),
        "each": ("mapping of names to number", "(required)", ""), "pair": ("[integer, number]", "[1, 2.0]", ""),
        "layers": ("list of integers|null", "null", ""), "on": ("boolean", "true", ""),
    }  # fmt: skip


def test_passes_and_targets_say_what_they_have() -> None:
    shown = trimtab("passes", "ffn-split").stdout
    assert {"budget.size", "budget.time", "budget.error"} < set(shown.split())
    assert "Budget" not in shown and "0<x<=1" in shown
    assert "no options" in trimtab("passes", "canonicalize").stdout
    from trimtab.compiler.targets import TARGET_NAMES, get_target

    listed = trimtab("targets").stdout
    assert all(get_target(name).summary in listed for name in TARGET_NAMES)


def test_bounds_that_typer_cannot_show_are_in_the_help() -> None:
    (temperature,) = (each for each in parameters("train") if each.name == "temperature")
    assert temperature.help.endswith("[x>0]")
