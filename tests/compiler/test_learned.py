"""Recipes whose weights are not learned: refused before anything is opened, with the command that learns them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import tiny
from typer.testing import CliRunner, Result

from trimtab import passes
from trimtab.compiler import pipeline, profile_cache
from trimtab.compiler.cli.app import app
from trimtab.compiler.sources import open_source
from trimtab.passes import Pass, PassContext, PassResult
from trimtab.passes.errors import DataError, ModelError, NotLearnedError
from trimtab.passes.needs import Learned, Need
from trimtab.passes.profile import Profile, ProfileInfo

RECIPE = "passes: [dampen, recover]\ncalibration: {samples: 16, states: 64, max_tokens: 12}\nthreads: 1\n"
DAMPEN = {"dampen": {"factor": 1.0, "spare": None, "budget": None}}


class Gate(Pass):
    """A pass of a method to come, whose training adds a router."""

    name: ClassVar[str] = "gate"
    summary: ClassVar[str] = "for tests"
    needs: ClassVar[frozenset[Need]] = frozenset({Learned("lte")})

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        return PassResult(self.name, 0)


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(passes._PASSES, "dampen", tiny.PASS)
    monkeypatch.setitem(passes._PASSES, "gate", f"{__name__}:Gate")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tiny.model(tmp_path / "model.onnx")
    tiny.data(tmp_path / "data.npz")
    Path("recipe.yaml").write_text(RECIPE)


@pytest.fixture
def nothing_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever takes time must not begin."""

    def begun(*_: Any, **__: Any) -> None:
        pytest.fail("it began something long")

    for module, name in (
        (pipeline, "open_source"), (pipeline, "read_data"), (pipeline, "measured_profile"), (pipeline, "BuildWriter"),
        (profile_cache, "calibrate"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, begun)


def trimtab(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


def profile(learned: dict[str, Any], tensors: tuple[str, ...] = ("learned.recover.down",)) -> Profile:
    info = ProfileInfo(model="m", data="d", samples=1, tokens=1, learned=learned)
    return Profile(info, {name: np.zeros((2, 2), np.float32) for name in tensors})


def behind(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"recover": {"from": {"passes": list(steps), "norms": {"down": 0.0}}}}


@pytest.mark.usefixtures("nothing_long")
@pytest.mark.parametrize("data", [None, "data.npz"])
@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "pass recover: there is no profile, and so no weights learned by recover"),
        (profile({}, ()), "pass recover: the profile holds no weights learned by recover"),
        (profile({}), "does not say for what graph recover learned"),
        (profile(behind()), "the passes before recover are dampen, but it learned behind none"),
        (profile(behind(DAMPEN, DAMPEN)), "are dampen, but it learned behind dampen, dampen"),
        (profile(behind({"dampen": {"factor": 0.5}})), "dampen runs with factor = 1.0, but recover learned with 0.5"),
    ],
)
def test_compile_says_so_first(given: Profile | None, says: str, data: str | None) -> None:
    with pytest.raises(NotLearnedError) as caught:
        pipeline.compile_model("model.onnx", "recipe.yaml", "build", data=data, profile=given)
    assert says in caught.value.message
    assert f"trimtab train model.onnx recipe.yaml --method recover --data {data or 'DATA'} " in str(caught.value)
    assert not Path("build").exists()


@pytest.mark.usefixtures("nothing_long")
def test_methods_to_come_declare_theirs_alike() -> None:
    with pytest.raises(NotLearnedError, match=r"pass gate: .*no weights learned by lte.*--method lte "):
        pipeline.compile_model("model.onnx", {"passes": ["gate", "recover"]}, "build", data="data.npz")
    have = profile(behind({"gate": {}}), ("learned.lte.router",))
    with pytest.raises(NotLearnedError, match=r"pass recover: .*no weights learned by recover"):
        pipeline.compile_model("model.onnx", {"passes": ["gate", "recover"]}, "build", profile=have)


@pytest.mark.usefixtures("nothing_long")
def test_the_command_has_the_paths_and_options_of_the_user() -> None:
    profile({}, ()).save("my profile.safetensors")
    done = trimtab(
        "compile", "model.onnx", "recipe.yaml", "-o", "build", "--set", "dampen.factor=0.5", "--shards", "1", "--data",
        "data.npz", "--profile", "my profile.safetensors",
    )  # fmt: skip
    assert done.exit_code == 1
    assert done.stderr.count("error: ") == done.stderr.count("hint: ") == 1
    command = shlex.split(done.stderr.split("`")[1])
    assert command == [
        "trimtab", "train", "model.onnx", "recipe.yaml", "--method", "recover",
        "--set", "dampen.factor=0.5", "--set", "shards=1", "--data", "data.npz",
        "--profile", "my profile.safetensors", "-o", "learned.safetensors",
    ]  # fmt: skip


def test_the_command_that_the_hint_gives_works() -> None:
    given = ("compile", "model.onnx", "recipe.yaml", "-o", "build", "--set", "dampen.factor=0.5")
    refused = trimtab(*given, "--data", "data.npz")
    _, learn, _, use, *_ = refused.stderr.split("`")
    learned = trimtab(*shlex.split(learn)[1:], "--steps", "2", "--batch-size", "4")
    assert learned.exit_code == 0, learned.output
    built = trimtab(*given, *shlex.split(use))
    assert built.exit_code == 0, built.output
    # What only the graph tells is refused later, with the same remedy.
    known = Profile.load("learned.safetensors")
    known.info.learned["recover"]["from"]["norms"]["down"] = 1e6  # type: ignore[index]
    known.save("learned.safetensors")
    late = trimtab(*given, *shlex.split(use))
    assert late.exit_code == 1 and "'down' is not the one that recover learned from" in late.stderr
    assert "trimtab train model.onnx recipe.yaml --method recover --set dampen.factor=0.5 " in late.stderr


def test_train_looks_at_the_recipe_before_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.compiler import sources

    monkeypatch.setattr(sources, "open_source", lambda *_, **__: pytest.fail("it opened the model"))
    common = ("train", "model.onnx", "recipe.yaml", "--data", "data.npz", "-o", "out.safetensors")
    for recipe, says in (
        ("passes: [gate, recover]\n", "pass gate: there is no profile, and so no weights learned by lte"),
        ("passes: [recover, dynamic-int8]\ntarget: tensorrt-rtx\n", "cannot run what pass dynamic-int8 makes"),
        ("passes: [dampen]\n", "the recipe has no pass 'recover'"),
    ):
        Path("recipe.yaml").write_text(recipe)
        done = trimtab(*common)
        assert done.exit_code == 1 and says in done.stderr, done.output
        assert not Path("out.safetensors").exists()


def test_data_that_do_not_fit_are_refused_before_the_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "check_finite", lambda *_, **__: pytest.fail("it read the weights"))
    np.savez("other.npz", tokens=np.zeros((3, 4), np.int64))
    Path("texts.txt").write_text("one\ntwo\n")
    for data, kind, says in (
        ("other.npz", DataError, r"holds the arrays \['tokens'\], but the model's inputs are"),
        ("texts.txt", ModelError, "has no tokenizer, so texts cannot be fed to it"),
    ):
        with pytest.raises(kind, match=says):
            pipeline.compile_model(open_source("model.onnx"), {"passes": ["dampen"]}, "build", data=data)
