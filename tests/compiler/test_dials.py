"""Dials: declared by a pass, inputs of the graph, set for each call or each sample; and one speed for all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo
from dialled import Dimmer, expected
from pydantic import ValidationError
from typer.testing import CliRunner

from trimtab.compiler import compile_model, load
from trimtab.compiler.builds.build import Build, open_build
from trimtab.compiler.checks.dense import dense_model
from trimtab.compiler.cli.app import app
from trimtab.compiler.engine import Engine
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner
from trimtab.passes import PassContext, run_passes
from trimtab.passes.dials import Dial, Dials, SpeedPoint, straight_path
from trimtab.passes.errors import InputError, PassError
from trimtab.passes.graph import load_graph

SEED = int(np.random.default_rng().integers(1 << 30))
WORKLOAD = {"batch": [1, 2, 4], "tokens": [1, 8, 16]}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    recipe = {"passes": [Dimmer()], "workload": WORKLOAD, "threads": 1}
    return compile_model(zoo.exported("bert"), recipe, tmp_path_factory.mktemp("dials") / "build")


@pytest.fixture(scope="module")
def engine(build: Build) -> Engine:
    return load(build.path, threads=1)


@pytest.fixture
def case(build: Build) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Inputs, and what the dense model makes of them."""
    print(f"seed {SEED}")
    feeds = zoo.feeds("bert", 3, 7, np.random.default_rng(SEED))
    return feeds, OnnxRuntimeRunner(dense_model(build)).run(feeds)["logits"]


@pytest.mark.parametrize(
    ("turned", "dim", "lift"),
    [
        ({}, 0.25, 0.5),
        ({"dials": {"dim": 0.75}}, 0.75, 0.5),
        ({"dials": {"dim": [0.0, 0.5, 0.9], "lift": np.array([1, 0, -2])}}, [0.0, 0.5, 0.9], [1, 0, -2]),
        ({"speed": 0}, 0.0, 0.0),
        ({"speed": 0.5}, 0.25, 0.5),
        ({"speed": 1.0}, 0.9, -2.0),
        ({"speed": 0.75}, 0.575, -0.75),
        ({"speed": [0.0, 0.25, 1.0]}, [0.0, 0.125, 0.9], [0.0, 0.25, -2.0]),
        ({"speed": 1.0, "dials": {"lift": 0.25}}, 0.9, 0.25),
    ],
    ids=str,
)
def test_a_call_is_turned(engine: Engine, case: Any, turned: dict[str, Any], dim: Any, lift: Any) -> None:
    feeds, dense = case
    np.testing.assert_allclose(engine.run(feeds, **turned)["logits"], expected(dense, dim, lift), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("turned", "message"),
    [
        ({"dials": {"dimm": 0.1}}, "unknown dial 'dimm'; did you mean 'dim'"),
        ({"dials": {"exit": 0.1}}, "unknown dial 'exit'; the engine has: dim, lift"),
        ({"dials": {"dim": float("nan")}}, "dial 'dim' is nan; give a number from 0 to 0.9"),
        ({"dials": {"dim": 0.91}}, "dial 'dim' is 0.91"),
        ({"dials": {"lift": -3}}, "dial 'lift' is -3; give a number from -2 to 2"),
        ({"dials": {"lift": [0, 0, float("inf")]}}, "dial 'lift' is inf"),
        ({"dials": {"lift": [0, 1]}}, "shape [2] for 3 samples"),
        ({"dials": {"lift": "fast"}}, "dial 'lift' is 'fast', not a number"),
        ({"dials": {"lift": [[1], [1, 2]]}}, "dial 'lift' is [[1], [1, 2]], not a number"),
        ({"dials": {1: 0.5}}, "unknown dial 1; the engine has: dim, lift"),
        ({"dials": ["lift"]}, "dials is ['lift'], not a mapping"),
        ({"dials": {"lift": True}}, "dial 'lift' is True, not a number"),
        ({"speed": 1.5}, "speed is 1.5; give a number from 0 to 1"),
        ({"speed": float("nan")}, "speed is nan"),
        ({"speed": None, "dials": {"lift": None}}, "dial 'lift' is None, not a number"),
    ],
    ids=str,
)
def test_impossible_settings(engine: Engine, case: Any, turned: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        engine.run(case[0], **turned)
    assert message in f"{error.value.message}; {error.value.hint}"


def test_a_build_says_what_its_dials_do(build: Build, engine: Engine) -> None:
    assert [dial.name for dial in engine.dials] == ["dim", "lift"] == [d.name for d in Dimmer().dials()]
    assert [tensor.name for tensor in engine.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert build.manifest.all_dials == Dials(Dimmer().dials(), straight_path(Dimmer().dials()))
    assert open_build(build.path).manifest == build.manifest
    assert all(error.max_abs is not None and error.max_abs < 1e-5 for error in build.manifest.check.outputs)
    report = (build.path / "report.md").read_text()
    assert "| dim | how much of the output goes | 0 to 0.9 | 0.25 | 0 | 0.9 |" in report


def test_a_build_without_dials_has_no_speed(tmp_path: Path) -> None:
    recipe = {"passes": [], "workload": WORKLOAD, "threads": 1}
    plain = load(compile_model(zoo.exported("bert"), recipe, tmp_path / "build").path)
    feeds = zoo.feeds("bert", 1, 4, np.random.default_rng(SEED))
    for turned in ({"speed": 0.5}, {"dials": {"dim": 0.5}}):
        with pytest.raises(InputError, match=r"no dials|unknown dial"):
            plain.run(feeds, **turned)  # type: ignore[arg-type]
    assert plain.run(feeds, dials={})["logits"].shape == (1, 3)


def run_json(*arguments: object) -> Any:
    done = CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--json")])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_checks_run_where_they_are_asked_to(build: Build) -> None:
    def worst(*options: object) -> float:
        return float(run_json("validate", build.path, *options)["outputs"][0]["max_abs"])

    assert worst() < 1e-4  # at the exact end, whatever the defaults are
    assert worst("--speed", 0) < 1e-4
    assert worst("--speed", 1) > 1
    assert worst("--speed", 0, "--dial", "lift=0.75") == pytest.approx(0.75, abs=1e-3)
    timed = run_json("bench", build.path, "--shapes", "1x4", "--seconds", 0.2, "--speed", 0.5, "--dial", "dim=0.1")
    assert timed["setting"] == {"dim": pytest.approx(0.1), "lift": 0.5}


@pytest.mark.parametrize("command", ["validate", "bench"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--speed", 2), "speed is 2"),
        (("--speed", "nan"), "speed is nan"),
        (("--dial", "dim"), "--dial dim: not of the form name=number"),
        (("--dial", "dim=much"), "--dial dim=much: not of the form"),
        (("--dial", "dimm=0.5"), "did you mean 'dim'"),
        (("--dial", "dim=5"), "give a number from 0 to 0.9"),
        (("--dial", "dim=0.1", "--dial", " dim=0.2"), "--dial dim=...: given twice"),
    ],
    ids=str,
)
def test_commands_refuse_impossible_settings(build: Build, command: str, options: Any, message: str) -> None:
    done = CliRunner().invoke(app, [command, str(build.path), *map(str, options)])
    assert done.exit_code == 1 and message in done.stderr


@pytest.mark.parametrize(
    "wrong",
    [{"low": 1.0}, {"exact": -1.0}, {"default": float("nan")}, {"fast": float("inf")}, {"name": "Exit threshold"}],
    ids=str,
)
def test_a_dial_is_sound(wrong: dict[str, Any]) -> None:
    sound = {"name": "dim", "meaning": "", "low": 0.0, "high": 1.0, "default": 0.5, "exact": 0.0, "fast": 1.0}
    assert Dial(**sound).range == "0 to 1"
    with pytest.raises((ValueError, ValidationError)):
        Dial(**sound | wrong)


def test_another_path_than_the_straight_one(engine: Engine) -> None:
    dials = engine.dials
    path = tuple(
        SpeedPoint(s, {"dim": d, "lift": u}) for s, d, u in [(0.0, 0.0, 0.0), (0.2, 0.6, 0.0), (1.0, 0.8, 1.0)]
    )
    found = Dials(dials, path).feeds(2, speed=[0.1, 0.6])
    np.testing.assert_allclose(found["dim"], [0.3, 0.7], rtol=1e-6)
    np.testing.assert_allclose(found["lift"], [0.0, 0.5], rtol=1e-6)
    assert all(value.dtype == np.float32 for value in found.values())


def test_a_dial_needs_a_name_of_its_own() -> None:
    graph = load_graph(zoo.exported("bert"))
    with pytest.raises(PassError, match="an input 'dim' already"):
        run_passes(graph, [Dimmer(), Dimmer()], PassContext())
