"""The Profile in the folder of a model: used where a pass needs it, and only if it is of that model."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import zoo
from packed_encoder import exit_weights
from typer.testing import CliRunner

from trimtab import passes
from trimtab.compiler import compile_model
from trimtab.compiler.builds.build import Build
from trimtab.compiler.cli.app import app
from trimtab.compiler.sources import open_source
from trimtab.passes.errors import DataError, NotLearnedError, ProfileError
from trimtab.passes.graph import load_graph, save_graph
from trimtab.passes.profile import Profile, ProfileInfo

CHECK = {"threads": 1, "workload": {"batch": [1, 2, 4], "tokens": [1, 8, 16]}}
MEASURED = {"passes": ["dampen"], "calibration": {"samples": 16, "states": 64, "max_tokens": 12}, **CHECK}
LEARNED = {"passes": ["unpad", "token-prune", "early-exit"], **CHECK}
NOTHING = {"passes": [], **CHECK}


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(passes._PASSES, "dampen", tiny.PASS)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The folder of a model without a Profile, and beside it data."""
    (tmp_path / "small").mkdir()
    tiny.model(tmp_path / "small/model.onnx")
    tiny.data(tmp_path / "data.npz")
    return tmp_path / "small"


@pytest.fixture
def pyramid(tmp_path: Path) -> Path:
    """A folder as `trimtab train --method magic-pyramid` leaves it: a classifier, and in it its Profile."""
    folder = tmp_path / "pyramid"
    folder.mkdir()
    save_graph(load_graph(zoo.exported("bert")), folder / "model.onnx")
    learned_profile(open_source(folder).fingerprint).save(folder / "profile.safetensors")
    return folder


def learned_profile(fingerprint: str) -> Profile:
    rng = np.random.default_rng(0)
    learned = {"thresholds": np.array([0, 0.1, 0.1], np.float32)} | exit_weights(rng, 1, "light", 48, 3)
    info = ProfileInfo(model=fingerprint, data="d", samples=1, tokens=1)
    return Profile(info, {f"learned.magic-pyramid.{name}": value for name, value in learned.items()})


def measure(small: Path) -> Path:
    """The Profile of the model in `small`, in its folder."""
    build = compile_model(small, MEASURED, "measured", data="data.npz")
    return Path(shutil.copyfile(build.path / "profile.safetensors", small / "profile.safetensors"))


def origin(build: Build) -> str | None:
    assert f"Profile: {build.manifest.profile_origin}." in (build.path / "report.md").read_text()
    return build.manifest.profile_origin


@pytest.mark.parametrize("data", [None, "data.npz"])
def test_what_was_learned_is_in_the_folder(pyramid: Path, data: str | None) -> None:
    tiny.data(Path("data.npz"))
    for model in (pyramid, "pyramid", open_source(pyramid)):
        build = compile_model(model, LEARNED, "build", data=data)
        assert origin(build) == str(pyramid / "profile.safetensors")
        assert [dial.name for dial in build.manifest.dials] == ["prune", "exit_threshold"]


@pytest.mark.parametrize("passes", [LEARNED["passes"], ["unpad", "token-prune"], ["unpad", "early-exit"]], ids=str)
def test_the_command_finds_it(pyramid: Path, passes: Any) -> None:
    Path("recipe.yaml").write_text(f"passes: [{', '.join(passes)}]\nthreads: 1\n")
    done = CliRunner().invoke(app, ["compile", "pyramid", "recipe.yaml", "-o", "build"])
    assert done.exit_code == 0, done.output
    assert f"profile: {pyramid / 'profile.safetensors'}\n" in done.stdout


def test_what_is_given_wins(small: Path) -> None:
    measured = measure(small)
    given = Profile.load(measured)
    given.info.choices["mine"] = 1
    given.save("given.safetensors")
    assert origin(compile_model(small, MEASURED, "build", profile="given.safetensors")) == str(
        small.parent / "given.safetensors"
    )
    assert origin(compile_model(small, MEASURED, "build", profile=given, force=True)) == "an object in memory"
    assert origin(compile_model(small, MEASURED, "build")) == str(measured)
    measured_now = compile_model(small, MEASURED, "build", data="data.npz")
    assert origin(measured_now) == f"measured on {small.parent / 'data.npz'}"


def test_a_file_is_no_folder(small: Path) -> None:
    measure(small)
    with pytest.raises(DataError, match="pass dampen needs to see how the model behaves"):
        compile_model(small / "model.onnx", MEASURED, "build")


def test_one_of_another_model(small: Path, pyramid: Path, caplog: pytest.LogCaptureFixture) -> None:
    measure(small)
    tiny.model(small / "model.onnx", seed=1)
    with pytest.raises(ProfileError, match=r"the profile .*small/profile.safetensors belongs to another model"):
        compile_model(small, MEASURED, "build")
    assert not Path("build").exists()
    with caplog.at_level(logging.WARNING, "trimtab"):
        build = compile_model(small, NOTHING, "build")
        assert compile_model(small, MEASURED, "again", data="data.npz").manifest.data is not None
    assert build.manifest.profile is build.manifest.profile_origin is None
    assert [r.message for r in caplog.records if "profile.safetensors belongs to another model" in r.message] == [
        f"not used: the profile {small / 'profile.safetensors'} belongs to another model"
    ] * 2
    learned_profile("0" * 64).save(pyramid / "profile.safetensors")
    with pytest.raises(ProfileError, match=r"pyramid/profile.safetensors belongs to another model"):
        compile_model(pyramid, LEARNED, "build")


def test_a_damaged_one(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    (small / "profile.safetensors").write_bytes(b"no profile")
    with pytest.raises(ProfileError, match=r"small/profile.safetensors: damaged, or not a profile"):
        compile_model(small, MEASURED, "build")
    with caplog.at_level(logging.WARNING, "trimtab"):
        compile_model(small, NOTHING, "build")
    assert "profile.safetensors: damaged, or not a profile" in caplog.text


@pytest.mark.parametrize("given", [False, True], ids=["in the folder", "given"])
@pytest.mark.parametrize("fault", ["no profile", "cut", "other model", "missing"])
def test_what_was_learned_is_learned_again_and_not_calibrated(pyramid: Path, fault: str, given: bool) -> None:
    """The command that learns it does not add to a Profile that cannot be used."""
    path = pyramid / "profile.safetensors"
    if fault == "other model":
        learned_profile("0" * 64).save(path)
    elif fault == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3] if fault == "cut" else b"no profile")
    Path("recipe.yaml").write_text(f"passes: [{', '.join(LEARNED['passes'])}]\n")
    words = ["compile", "pyramid", "recipe.yaml", "-o", "build", *(["--profile", str(path)] if given else [])]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "1000"})
    said = " ".join(done.stderr.split())
    command = "trimtab train pyramid recipe.yaml --method magic-pyramid --data DATA -o tuned"
    assert done.exit_code == 1 and command in said and "calibrate" not in said, said
    assert ("the model and the profile that belong together, or run" in said) == (fault == "other model")
    with pytest.raises(NotLearnedError, match="train pyramid RECIPE --method magic-pyramid"):
        compile_model("pyramid", LEARNED, "build", profile=path if given else None)


def test_weights_of_recover_are_learned_without_a_damaged_profile(small: Path) -> None:
    Path("damaged.safetensors").write_bytes(b"no profile")
    recipe = {"passes": ["dampen", "recover"], "calibration": MEASURED["calibration"]}
    with pytest.raises(NotLearnedError, match=r"damaged.safetensors: damaged") as caught:
        compile_model(small, recipe, "build", profile="damaged.safetensors")
    assert "--method recover" in str(caught.value.hint) and "damaged" not in str(caught.value.hint)


def test_one_that_learned_nothing(small: Path) -> None:
    measure(small)
    with pytest.raises(NotLearnedError, match="the profile holds no thresholds learned by magic-pyramid") as caught:
        compile_model(small, LEARNED, "build")
    assert str(caught.value).endswith("and compile the model `tuned`")


def test_training_adds_to_it(pyramid: Path) -> None:
    from trimtab.training.run import train

    rng = np.random.default_rng(0)
    np.savez("data.npz", **zoo.feeds("bert", 32, 8, rng))
    recipe: dict[str, Any] = {"passes": ["recover", *LEARNED["passes"]], **CHECK}
    train("recover", pyramid, "data.npz", "both.safetensors", recipe=recipe, settings={"steps": 1, "batch_size": 4})
    both, before = Profile.load("both.safetensors"), Profile.load(pyramid / "profile.safetensors")
    assert both.learned("recover") and both.learned("magic-pyramid").keys() == before.learned("magic-pyramid").keys()
    assert origin(compile_model(pyramid, recipe, "build", profile="both.safetensors"))
