from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import zoo
from sealed import entry, listed, seal
from typer.testing import CliRunner

from trimtab.compiler.builds.build import open_build
from trimtab.compiler.checks import timing
from trimtab.compiler.checks.bench import bench, parse_shapes, time_runs
from trimtab.compiler.checks.measure import relative_l2
from trimtab.compiler.checks.peers import open_peer
from trimtab.compiler.checks.peers.ort import quantized
from trimtab.compiler.checks.speed import Bench, TimedRun, key, speedups
from trimtab.compiler.checks.timing import interleave
from trimtab.compiler.cli.app import app
from trimtab.compiler.feeds import random_feeds
from trimtab.compiler.pipeline import compile_model
from trimtab.compiler.targets import get_target
from trimtab.compiler.targets.tensorrt.info import EngineInfo
from trimtab.compiler.workload import Workload
from trimtab.passes.errors import InputError, RecipeError, TargetError
from trimtab.passes.graph import load_graph
from trimtab.plugins.driver import gpu_present

RECIPE = {"passes": [], "workload": {"batch": [1, 2, 4], "tokens": [8, 12, 16]}, "threads": 1}


@pytest.fixture(scope="module")
def dense():
    return zoo.exported("bert")


@pytest.fixture(scope="module")
def build(dense, tmp_path_factory):
    return compile_model(dense, RECIPE, tmp_path_factory.mktemp("builds") / "bert")


def cli(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


class Clock:
    """Time that passes only while a runner runs."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0, []
        monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: self.now)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now / 1e9)

    def runner(self, name, *milliseconds):
        def run(*_):
            times = self.calls.count(name)
            self.calls.append(name)
            self.now += round(1e6 * milliseconds[times % len(milliseconds)])

        return run


def test_runners_take_turns_in_blocks_and_the_order_rotates(monkeypatch):
    clock = Clock(monkeypatch)
    found = interleave({name: clock.runner(name, 1) for name in "abc"}, seconds=0, block=2, warmup=1)
    assert "".join(clock.calls) == "aaabbbccc" + "bbbcccaaa" + "cccaaabbb"
    assert {each.samples for each in found.values()} == {6}


def test_warm_up_runs_are_not_counted(monkeypatch):
    clock = Clock(monkeypatch)
    found = interleave({"a": clock.runner("a", 100, 100, 1, 2, 3, 4, 10)}, seconds=0)
    assert found["a"] == timing.Timing(3.0, pytest.approx(10.0), 15)


def test_it_goes_on_for_as_long_as_it_may(monkeypatch):
    clock = Clock(monkeypatch)
    interleave({name: clock.runner(name, 1) for name in "ab"}, seconds=0.1)
    assert 100 <= clock.now / 1e6 < 100 + 14  # the round under way is finished


def test_ratios_and_speedups(monkeypatch, dense):
    clock = Clock(monkeypatch)
    runs = {
        name: clock.runner(name, milliseconds)
        for name, milliseconds in (("compiled", 2), ("dense-fp32", 6), ("dense-int8", 3), ("openvino-bf16", 1))
    }
    timed = time_runs(runs, load_graph(dense), Workload(), [(1, 8), (2, 8)], seconds=0)
    assert [(run.name, run.tokens, run.median_ms, run.ratio) for run in timed[2, 8]] == [
        ("compiled", 8, 2, 1), ("dense-fp32", 8, 6, 3), ("dense-int8", 8, 3, 1.5), ("openvino-bf16", 8, 1, 0.5),
    ]  # fmt: skip
    assert speedups(timed[1, 8]) == pytest.approx({"vs_dense": 3, "vs_int8": 1.5, "vs_openvino_bf16": 0.5})


def test_speedups_over_shapes_are_geometric_means_and_may_be_unknown():
    def run(name, batch, ratio):
        return TimedRun(name=name, batch=batch, tokens=8, median_ms=ratio, p95_ms=1, samples=1, ratio=ratio)

    runs = [run("compiled", 1, 1), run("dense-fp32", 1, 1), run("compiled", 2, 1), run("dense-fp32", 2, 4)]
    assert speedups(runs) == {"vs_dense": pytest.approx(2), "vs_int8": None}
    assert key("openvino-fp32") == "vs_openvino_fp32"


def test_bench_times_every_engine_at_every_shape(build):
    for wrong, says in (({"seconds": -1.0}, "seconds is -1"), ({"threads": 0}, "threads is 0, not an integer from 1")):
        with pytest.raises(InputError, match=says):
            bench(build, **wrong)
    found = bench(build, seconds=0)
    assert [(run.name, run.batch, run.tokens) for run in found.runs] == [
        (name, batch, 12) for batch in (1, 2) for name in ("compiled", "dense-fp32", "dense-int8")
    ]
    for run in found.runs:
        assert 0 < run.median_ms <= run.p95_ms
        assert run.samples >= 15
        ours = next(r for r in found.runs if (r.name, r.batch) == ("compiled", run.batch))
        assert run.ratio == pytest.approx(run.median_ms / ours.median_ms)
    at_opt = {run.name: run.ratio for run in found.runs if run.batch == 2}
    assert found.speedup == pytest.approx({"vs_dense": at_opt["dense-fp32"], "vs_int8": at_opt["dense-int8"]})
    assert found.like_for_like == "vs_dense"
    assert found.machine.threads == 1
    kept = open_build(build.path).measured.speed
    assert kept["vs_dense"] == pytest.approx(found.speedup["vs_dense"], abs=1e-3)
    assert len(kept["runs"]) == 6


def test_the_speedup_is_that_of_the_opt_shape_wherever_it_stands(build):
    found = bench(build, shapes=[(2, 12), (1, 12)], seconds=0)
    assert found.speedup["vs_dense"] == pytest.approx(found.runs[1].ratio)


def test_an_int8_build_is_held_against_int8(build):
    recipe = build.manifest.recipe | {"passes": [{"dynamic-int8": {}}]}
    int8 = replace(build, manifest=build.manifest.model_copy(update={"recipe": recipe}))
    assert bench(int8, shapes=[(1, 8)], seconds=0).like_for_like == "vs_int8"


@pytest.mark.skipif(gpu_present(), reason="this machine could run the engine")
def test_an_engine_that_cannot_run_here(build, tmp_path):
    copy = shutil.copytree(build.path, tmp_path / "gpu")
    (copy / "engine").mkdir()
    version = get_target("tensorrt-rtx")._version() or "1"
    told = EngineInfo(target="tensorrt-rtx", library="tensorrt_rtx", version=version, precisions=(), engines=())
    told.write(copy / "engine")
    files = listed(copy) | {"engine/engine.json": entry(copy / "engine" / "engine.json")}
    seal(copy, target="tensorrt-rtx", files=files)
    said = cli("bench", copy)
    assert said.exit_code == 1
    assert "tensorrt-rtx" in said.stderr
    assert "hint: " in said.stderr


def test_the_command_prints_json_alone(build):
    said = cli("bench", build.path, "--json", "--seconds", 0, "--shapes", "1x8,3x16", "--peer", "dense-fp32")
    assert said.exit_code == 0, said.stderr
    found = json.loads(said.stdout)
    assert set(found["speedup"]) == {"vs_dense", "vs_int8"}
    assert len(found["runs"]) == 6
    assert {(run["batch"], run["tokens"]) for run in found["runs"]} == {(1, 8), (3, 16)}
    assert set(found["runs"][0]) >= {"name", "batch", "tokens", "median_ms", "p95_ms"}
    assert found["speedup"]["vs_dense"] == found["runs"][4]["ratio"]  # opt was not timed: the last shape
    Bench.model_validate(found)


def test_the_command_shows_a_table(build):
    said = cli("bench", build.path, "--seconds", 0, "--shapes", "2x12")
    assert said.exit_code == 0, said.stderr
    assert "2x12" in said.stdout
    assert "times as fast as dense-fp32 (like for like)" in said.stdout


@pytest.mark.parametrize("text", ["8", "8x", "8x0", "ax4", "1x2x3", "", "-1x4"])
def test_shapes_that_are_none(text):
    with pytest.raises(RecipeError, match="BATCHxTOKENS"):
        parse_shapes(text)


def test_shapes():
    assert parse_shapes("1x48, 8X48") == [(1, 48), (8, 48)]


def test_an_unknown_peer_names_the_nearest(build):
    said = cli("bench", build.path, "--peer", "openvino-bf61")
    assert said.exit_code == 1
    assert "did you mean 'openvino-bf16'?" in said.stderr


def test_a_peer_that_is_not_installed_says_how_to_install_it(monkeypatch, dense):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(TargetError, match=r'pip install "trimtab\[peers\]"'):
        open_peer("openvino-fp32", dense, 1)


@pytest.mark.parametrize(
    ("peer", "tolerance"), [("dense-fp32", 1e-5), ("dense-int8", 0.1), ("openvino-fp32", 1e-3), ("openvino-bf16", 0.1)]
)
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_peers_compute_the_dense_model(peer, tolerance, family):
    if peer.startswith("openvino"):
        pytest.importorskip("openvino")
    path = zoo.exported(family)
    run = open_peer(peer, path, 1)
    for batch in (1, 3):  # fresh shapes, the second larger than the first
        feeds = random_feeds(load_graph(path), {"batch": batch, "tokens": 8 + batch}, np.random.default_rng(batch))
        expected, found = open_peer("dense-fp32", path, 1)(feeds)["logits"], run(feeds)["logits"]
        assert found.shape == expected.shape
        assert relative_l2(expected, found) < tolerance


def test_int8_is_made_once_and_is_int8(dense):
    path = quantized(dense)
    before = path.stat().st_mtime_ns
    assert quantized(dense) == path
    assert path.stat().st_mtime_ns == before
    model = onnx.load(path)
    assert sum(node.op_type == "MatMulInteger" for node in model.graph.node) >= 18  # six in each of three layers
    weights = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert any(len(tensor.dims) == 2 for tensor in weights)
    assert quantized(zoo.exported("vit")) != path


def test_a_decoder_is_timed_beside_its_int8_self(tmp_path: Path) -> None:
    """Behind GroupQueryAttention ONNX infers no types, and the quantizer needs some."""
    source = zoo.save_pretrained("llama", tmp_path / "model")
    recipe = {"passes": ["dynamic-int8"], "workload": {"batch": 1, "tokens": [1, 4, 8]}, "threads": 1}
    build = compile_model(source, recipe, tmp_path / "build")
    found = bench(build, shapes=[(1, 1), (1, 4)], seconds=0)
    assert {run.name for run in found.runs} == {"compiled", "dense-fp32", "dense-int8"}
