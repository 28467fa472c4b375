"""Peers that users would pick: their own exported file under default options, and OpenVINO calibrated on their data."""

from __future__ import annotations

import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import zoo
from onnxruntime.quantization import quantize_dynamic
from seeds import seeded
from typer.testing import CliRunner

from trimtab.compiler.builds.build import open_build
from trimtab.compiler.checks.measure import relative_l2
from trimtab.compiler.checks.peers import open_peer, ort_default, peer_model
from trimtab.compiler.cli.app import app
from trimtab.compiler.feeds import random_feeds
from trimtab.compiler.pipeline import compile_model
from trimtab.passes import PassContext, pass_class, run_passes
from trimtab.passes.canonicalize import Canonicalize
from trimtab.passes.errors import DataError, TargetError
from trimtab.passes.graph import load_graph, save_graph

RECIPE = {
    "passes": [],
    "workload": {"batch": [1, 2, 4], "tokens": [8, 12, 16]},
    "threads": 1,
    "calibration": {"samples": 24, "batch_size": 8, "max_tokens": 12},
}
SEED = int(np.random.SeedSequence().entropy % 2**32)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    return compile_model(zoo.exported("bert"), RECIPE, tmp_path_factory.mktemp("builds") / "bert")


@pytest.fixture(scope="module")
def data(tmp_path_factory, build):
    """Random inputs of one length, as tensors."""
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    graph = load_graph(peer_model(build).canonical)
    path = tmp_path_factory.mktemp("data") / "calibration.npz"
    np.savez(path, **random_feeds(graph, {"batch": 32, "tokens": 10}, rng))
    return path


def cli(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2"])
def test_default_peers_are_onnxruntime_alone_on_the_exported_file(family, tmp_path):
    exported = zoo.exported(family)
    built = compile_model(exported, RECIPE, tmp_path / "build")
    model = peer_model(built)
    assert model.export() == exported
    assert model.canonical != exported
    proto = onnx.load(exported)
    del proto.graph.value_info[:]  # the quantizer refuses the stale shapes of torch's exporter
    quantize_dynamic(proto, tmp_path / "int8.onnx")
    print(f"seed {SEED}")
    feeds = random_feeds(load_graph(exported), {"batch": 3, "tokens": 9}, np.random.default_rng(SEED), padded=True)
    for peer, path in (("ort-fp32-default", exported), ("ort-int8-default", tmp_path / "int8.onnx")):
        session = onnxruntime.InferenceSession(path)
        expected = dict(zip([t.name for t in session.get_outputs()], session.run(None, feeds), strict=True))
        outputs = open_peer(peer, model, 1)(feeds)
        assert outputs.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(outputs[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_dense_int8_of_a_model_in_half_precision(family, tmp_path):
    """Whose products the quantizer leaves in float16 with scales in float32, which no runtime opens."""
    half = tmp_path / "half.onnx"
    graph = load_graph(zoo.exported(family))
    run_passes(graph, [Canonicalize(), pass_class("precision")(type="float16")], PassContext())
    save_graph(graph, half)
    feeds = random_feeds(load_graph(half), {"batch": 3, "tokens": 9}, seeded(), padded=True)
    expected, quantized = (open_peer(peer, half, 1)(feeds) for peer in ("dense-fp32", "dense-int8"))
    assert expected.keys() == quantized.keys()
    for name, value in expected.items():
        assert 0 < relative_l2(value.astype(np.float64), quantized[name].astype(np.float64)) < 0.2, name


def test_a_file_that_quantize_dynamic_refuses_is_named(monkeypatch):
    def refuse(*_, **__):
        raise ValueError("no such type\nsecond line")

    monkeypatch.setattr(ort_default, "quantize_file", refuse)
    with pytest.raises(TargetError, match=r"model\.onnx: quantize_dynamic .*\(no such type\)"):
        open_peer("ort-int8-default", zoo.exported("roberta"), 1)


def test_openvino_int8_is_calibrated_on_the_data_and_is_int8(build, data):
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    model = peer_model(build, data=data)
    batches = list(model.calibration.feeds())
    assert [len(feed["input_ids"]) for feed in batches] == [8, 8, 8]
    run, again = open_peer("openvino-int8", model, 1), open_peer("openvino-int8", model, 1)
    graph = load_graph(model.canonical)
    for tokens in (10, 13):
        feeds = random_feeds(graph, {"batch": 16, "tokens": tokens}, np.random.default_rng(SEED + tokens))
        expected, quantized = open_peer("dense-fp32", model, 1)(feeds)["logits"], run(feeds)["logits"]
        assert 0 < relative_l2(expected, quantized) < 0.8
        np.testing.assert_array_equal(quantized, again(feeds)["logits"])  # the second one is from the cache
    from trimtab.compiler.cache import cache_dir

    (path,) = (cache_dir() / "openvino-int8").glob("*/model.xml")
    kinds = [op.get_type_name() for op in openvino.Core().read_model(path).get_ops()]
    assert kinds.count("FakeQuantize") >= 18  # the input of each product of three layers


def test_openvino_int8_without_data_says_what_to_give(build):
    pytest.importorskip("nncf")
    with pytest.raises(DataError, match="no data") as refused:
        open_peer("openvino-int8", peer_model(build), 1)
    assert "--peer-data" in refused.value.hint


def test_a_missing_nncf_says_how_to_install_it(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(TargetError, match="openvino-int8 needs nncf"):
        open_peer("openvino-int8", peer_model(build), 1)


def test_bench_shows_them_in_one_run_and_prints_json_alone(build, data):
    pytest.importorskip("nncf")
    peers = ("ort-fp32-default", "ort-int8-default", "openvino-int8")
    chosen = [word for peer in peers for word in ("--peer", peer)]
    ran = cli("bench", build.path, "--seconds", 0, "--shapes", "2x12", "--json", "--peer-data", data, *chosen)
    assert ran.exit_code == 0, ran.stderr
    timed = json.loads(ran.stdout)
    assert [run["name"] for run in timed["runs"]] == ["compiled", "dense-fp32", "dense-int8", *peers]
    assert {"vs_ort_fp32_default", "vs_ort_int8_default", "vs_openvino_int8"} <= timed["speedup"].keys()
    assert timed["machine"]["instructions"] == sorted(timed["machine"]["instructions"])


def test_an_unknown_peer_is_refused_before_anything_is_made(build, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    ran = cli("bench", build.path, "--peer", "ort-int8-defaults")
    assert ran.exit_code == 1
    assert "did you mean 'ort-int8-default'?" in ran.stderr
    assert not (tmp_path / "cache").exists()


def test_data_that_cannot_be_read_are_refused(build, tmp_path):
    ran = cli("bench", build.path, "--peer", "openvino-int8", "--peer-data", tmp_path / "none.txt")
    assert ran.exit_code == 1
    assert "no such file" in ran.stderr
    assert open_build(build.path)


def test_validate_judges_peers_by_the_same_samples(build, data):
    ran = cli("validate", build.path, "--data", data, "--json", "--peer", "dense-fp32", "--peer", "ort-int8-default")
    assert ran.exit_code == 0, ran.stderr
    validation = json.loads(ran.stdout)
    assert validation["peers"].keys() == {"dense-fp32", "ort-int8-default"}
    assert validation["peers"]["dense-fp32"]["agreement"] == 1
    with np.load(data) as file:
        feeds = dict(file)
    model = peer_model(build)
    dense, int8 = (open_peer(name, model, 1)(feeds)["logits"].argmax(-1) for name in ("dense-fp32", "ort-int8-default"))
    by_hand = np.mean(dense == int8)  # activations are quantized by the batch, so a tie may fall otherwise
    assert validation["peers"]["ort-int8-default"]["agreement"] == pytest.approx(by_hand, abs=0.2)
    assert validation["peers"]["ort-int8-default"]["samples"] == 32
    rows = open_build(build.path).measured.quality["peers"]
    assert [row["engine"] for row in rows] == ["trimtab", "dense-fp32", "ort-int8-default"]


def test_validate_shows_peers_in_one_table(build, data):
    ran = cli("validate", build.path, "--data", data, "--peer", "dense-int8")
    assert ran.exit_code == 0, ran.stderr
    lines = [line.split() for line in ran.stdout.splitlines()]
    table = lines[lines.index(["engine", "agreement"]) :]
    assert [row[0] for row in table[1:3]] == ["trimtab", "dense-int8"]


@pytest.mark.parametrize(
    ("words", "message"), [(("--peer", "dense-int8"), "needs data"), (("--peer", "dense-int9"), "did you mean")]
)
def test_validate_refuses_peers_it_cannot_judge(build, words, message):
    ran = cli("validate", build.path, *words)
    assert ran.exit_code == 1
    assert message in ran.stderr
