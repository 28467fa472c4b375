"""`trimtab cost`: FLOPs, quality and exits at each speed, and the path that is measured for `speed`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo
from packed_encoder import exit_weights
from typer.testing import CliRunner

from trimtab.compiler import compile_model, load
from trimtab.compiler.builds.build import Build, find_build, open_build
from trimtab.compiler.checks.cost import Cost, Counter
from trimtab.compiler.checks.dense import dense_model
from trimtab.compiler.checks.measured_cost import cost
from trimtab.compiler.cli.app import app
from trimtab.compiler.sources import open_source
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner
from trimtab.passes.errors import BuildError, InputError, ModelError, TargetError
from trimtab.passes.profile import Profile, ProfileInfo

SEED = int(np.random.default_rng().integers(1 << 30))
SAMPLES, TOKENS = 24, 18
WORKLOAD = {"batch": [1, 4, 8], "tokens": [1, 16, 32]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A tiny BERT with random thresholds and an exit."""
    rng, path = np.random.default_rng(SEED), zoo.exported("bert")
    learned = {"thresholds": np.array([0, 0.06, 0.08], np.float32)} | exit_weights(rng, 1, "light", 48, 3)
    info = ProfileInfo(model=open_source(path).fingerprint, data="d", samples=1, tokens=1)
    profile = Profile(info, {f"learned.magic-pyramid.{name}": value for name, value in learned.items()})
    recipe = {"passes": ["unpad", "token-prune", "early-exit"], "workload": WORKLOAD, "threads": 1}
    return compile_model(path, recipe, tmp_path_factory.mktemp("cost") / "build", profile=profile)


@pytest.fixture
def build(made: Build, tmp_path: Path) -> Build:
    """A copy of it, to write to."""
    return open_build(shutil.copytree(made.path, tmp_path / "build"))


@pytest.fixture
def data(made: Build, tmp_path: Path) -> Path:
    """Inputs of random lengths, as in a padded batch, and the dense model's classes as labels but for every fourth."""
    print(f"seed {SEED}")
    feeds = zoo.feeds("bert", SAMPLES, TOKENS, np.random.default_rng(SEED + 1))
    label = OnnxRuntimeRunner(dense_model(made)).run(feeds)["logits"].argmax(-1)
    label[::4] = (label[::4] + 1) % 3
    np.savez(tmp_path / "data.npz", **feeds, label=label)
    np.savez(tmp_path / "plain.npz", **feeds)
    return tmp_path / "data.npz"


def inputs(data: Path) -> dict[str, np.ndarray]:
    return {name: array for name, array in np.load(data).items() if name != "label"}


def executed(build: Build, feeds: dict[str, np.ndarray], speed: float, size: int) -> tuple[Cost, dict[str, np.ndarray]]:
    """Cost and answers of all samples, in batches of `size`."""
    count, dials = Counter(build.model, 1), build.manifest.all_dials.feeds(size, speed=speed)
    parts = [{n: array[at : at + size] for n, array in feeds.items()} for at in range(0, SAMPLES, size)]
    costs, outputs = zip(*(count.run(part | dials) for part in parts), strict=True)
    return sum(costs[1:], costs[0]), {n: np.concatenate([each[n] for each in outputs]) for n in outputs[0]}


def trimtab(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_table_is_what_was_executed(build: Build, data: Path) -> None:
    done = trimtab(
        "cost", build.path, "--data", data, "--speeds", "0,0.6,1", "--batch-size", 8, "--seconds", 0, "--json"
    )
    assert done.exit_code == 0, done.output
    found, feeds = json.loads(done.stdout), inputs(data)
    labels = np.load(data)["label"]
    whole = Counter(dense_model(build))(feeds).flops  # padding and all
    assert found["dense_flops"] == pytest.approx(whole / SAMPLES)
    assert found["dense_score"] == 0.75 and found["measured"] == "accuracy"
    assert found["padding"] == pytest.approx(1 - feeds["attention_mask"].mean())
    assert [setting["speed"] for setting in found["settings"]] == [0, 0.6, 1]
    for setting in found["settings"]:
        assert setting["dials"] == build.manifest.all_dials.values(speed=setting["speed"])
        counted, run = executed(build, feeds, setting["speed"], 8)
        assert setting["flops"] == pytest.approx(counted.flops / SAMPLES)
        assert setting["fewer"] == pytest.approx(whole / counted.flops)
        assert setting["quality"]["compiled"] == pytest.approx(np.mean(run["logits"].argmax(-1) == labels))
        ran, times = np.unique(run["exit_layer"], return_counts=True)
        assert setting["exits"] == {str(n): pytest.approx(k / SAMPLES) for n, k in zip(ran, times, strict=True)}
        real = feeds["attention_mask"].sum()
        for kept, passage in zip(setting["kept"], counted.passages, strict=True):
            assert kept["stayed"] == pytest.approx(passage.stayed / (SAMPLES if kept["what"] == "samples" else real))
    flops = [setting["flops"] for setting in found["settings"]]
    assert flops[0] > flops[2]
    assert open_build(build.path).measured.cost["samples"] == SAMPLES
    assert "share of samples by layers run" in (build.path / "report.md").read_text()


def test_the_text_and_the_plot(build: Build, data: Path, tmp_path: Path) -> None:
    for suffix in ("svg", "png"):
        plot = tmp_path / f"cost.{suffix}"
        done = trimtab("cost", build.path, "--data", data, "--seconds", 0.1, "--samples", 10, "--plot", plot)
        assert done.exit_code == 0, done.output
        assert plot.stat().st_size > 1000
    assert "10 samples of" in done.stdout and "in batches of 1" in done.stdout
    header = next(line for line in done.stdout.splitlines() if line.startswith("speed"))
    assert header.split() == [
        "speed", "prune", "exit_threshold", "FLOPs", "times", "fewer", "accuracy", "ms", "times", "as", "fast",
    ]  # fmt: skip


def test_without_labels_the_dense_model_judges(build: Build, data: Path) -> None:
    report, _ = cost(build, data=data.with_name("plain.npz"), dials={"exit_threshold": 0.0, "prune": 0.0}, seconds=0)
    (setting,) = report.settings
    assert (report.measured, report.dense_score) == ("agreement", None)
    assert setting.quality is not None and setting.quality.score == 1 and setting.speed is None


def test_a_path_is_measured_and_stored(build: Build, data: Path) -> None:
    before = load(build.path)
    done = trimtab(
        "cost", build.path, "--data", data, "--store-path", "--grid", "prune=0.5,1,2", "--grid",
        "exit_threshold=0.2,0.6,1", "--seconds", 0, "--json", "--threads", 1,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found, after = json.loads(done.stdout), open_build(build.path)
    path = after.manifest.speed
    assert found["manifest_sha256"] == after.hash != build.hash
    assert [point["speed"] for point in found["path"]] == [point.speed for point in path]
    assert after.manifest.model_copy(update={"speed": build.manifest.speed}) == build.manifest
    assert path[0].speed == 0 and path[0].dials == {"prune": 0, "exit_threshold": 0} and path[-1].speed == 1
    feeds = inputs(data)
    costs = [executed(after, feeds, point.speed, 1)[0].flops for point in path]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == len(costs)
    shares = [np.log(costs[0] / each) / np.log(costs[0] / costs[-1]) for each in costs]
    np.testing.assert_allclose([point.speed for point in path], shares, atol=1e-9)
    assert found["settings"][0]["flops"] == costs[0] / SAMPLES and found["settings"][-1]["flops"] == costs[-1] / SAMPLES
    assert after.measured.cost["samples"] == SAMPLES  # recorded under the new manifest
    kept = find_build(after.path, build.manifest.key)
    assert kept is not None and kept.manifest.speed == path  # a compile of the same leaves it
    engine = load(after.path)
    np.testing.assert_array_equal(engine.run(feeds)["logits"], before.run(feeds)["logits"])
    assert not [p for p in build.path.parent.iterdir() if p.name.startswith(".")]


def test_what_was_measured_stays_with_a_path(build: Build, data: Path) -> None:
    done = trimtab("validate", build.path, "--data", data, "--samples", 4)
    assert done.exit_code == 0, done.output
    quality = open_build(build.path).measured.quality
    cost(
        open_build(build.path),
        data=data,
        samples=8,
        seconds=0,
        save_path=True,
        values={"prune": [1], "exit_threshold": [1]},
    )
    assert quality and open_build(build.path).measured.quality == quality


def test_the_exact_end_may_be_all_that_is_allowed(build: Build, data: Path) -> None:
    never = {"prune": [0.0], "exit_threshold": [0.0]}
    with pytest.raises(ModelError, match="no setting of the dials computes less than the exact one"):
        cost(build, data=data, seconds=0, save_path=True, values=never)
    assert open_build(build.path).hash == build.hash


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--speeds", "0,2"), 1, "speed is 2; give a number|speed is 2"),
        (("--speeds", "0;1"), 1, "--speeds 0;1: not numbers"),
        (("--speeds", "nan"), 1, "speed is nan"),
        (("--dial", "prun=1"), 1, "did you mean 'prune'"),
        (("--dial", "prune=5"), 1, "dial 'prune' is 5"),
        (("--grid", "prune=1"), 2, "belong to --store-path"),
        (("--max-drop", "1"), 2, "belong to --store-path"),
        (("--store-path", "--grid", "prun=1"), 1, "did you mean 'prune'"),
        (("--store-path", "--grid", "prune=1,x"), 1, "--grid prune=1,x: not numbers"),
        (("--store-path", "--grid", "prune=1", "--grid", "prune=2"), 1, "--grid prune=...: given twice"),
        (("--seconds", "inf"), 2, "Input should be less than or equal to 86400"),
        (("--store-path", "--grid", "prune=9"), 1, "dial 'prune' is 9"),
        (("--plot", "cost.gif"), 1, "a plot is written as .svg, .png, .pdf"),
        (("--plot", "/nowhere/cost.svg"), 1, "/nowhere: no such folder"),
    ],
    ids=str,
)
def test_what_is_refused(made: Build, data: Path, options: Any, code: int, message: str) -> None:
    done = trimtab("cost", made.path, "--data", data, *options)
    assert done.exit_code == code and any(each in done.output for each in message.split("|")), done.output
    assert open_build(made.path).hash == made.hash


def test_builds_without_dials(data: Path, tmp_path: Path) -> None:
    recipe = {"passes": ["unpad"], "workload": WORKLOAD, "threads": 1}
    plain = compile_model(zoo.exported("bert"), recipe, tmp_path / "plain")
    report, _ = cost(plain, data=data, batch=8, seconds=0)
    (setting,) = report.settings
    assert setting.fewer > 1 and setting.dials == {} and setting.kept == ()  # padding is not computed
    for options in ({"speeds": [0.5]}, {"save_path": True}):
        with pytest.raises(InputError, match="no dials"):
            cost(plain, data=data, **options)  # type: ignore[arg-type]


def test_shards_and_damage(build: Build, data: Path) -> None:
    divided = Build(build.path, build.manifest.model_copy(update={"shards": 2}), build.hash)
    with pytest.raises(TargetError, match="the FLOPs of 2 shards are not counted"):
        cost(divided, data=data)
    with open(build.path / "recipe.yaml", "a") as file:
        file.write("\n")
    with pytest.raises(BuildError, match="damaged"):
        cost(build, data=data, samples=4, seconds=0, save_path=True, values={"prune": [1], "exit_threshold": [1]})
