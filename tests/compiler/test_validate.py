from __future__ import annotations

import json

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import zoo
from typer.testing import CliRunner

from trimtab.compiler.builds.build import open_build
from trimtab.compiler.checks.peers import open_peer
from trimtab.compiler.checks.task import check_quality
from trimtab.compiler.checks.validate import Limits, validate
from trimtab.compiler.cli.app import app
from trimtab.compiler.data import read_data
from trimtab.compiler.data.tokenizer import load_tokenizer
from trimtab.compiler.pipeline import compile_model
from trimtab.compiler.sources import Source
from trimtab.compiler.workload import Workload
from trimtab.passes.errors import DataError, InputError, RecipeError, TargetError
from trimtab.passes.graph import insert, load_graph, rename_output, save_graph

WORKLOAD = {"batch": [1, 3, 6], "tokens": [8, 12, 24]}
RECIPE = {"passes": [], "workload": WORKLOAD, "threads": 1}


@pytest.fixture(scope="module")
def dense():
    return zoo.exported("bert")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return zoo.save_pretrained("bert", tmp_path_factory.mktemp("bert"))


def source(onnx, tokenizer):
    return Source(origin="tiny", onnx=onnx, tokenizer=tokenizer, labels=("a", "b", "c"), max_tokens=None, kind="onnx")


@pytest.fixture(scope="module")
def build(dense, tokenizer, tmp_path_factory):
    return compile_model(source(dense, tokenizer), RECIPE, tmp_path_factory.mktemp("builds") / "same")


@pytest.fixture(scope="module")
def broken(dense, tokenizer, tmp_path_factory):
    """A build of a model that multiplies its logits by 1.5 wherever a batch has more than 4 samples."""
    graph = load_graph(dense)
    logits = graph.outputs[0]
    ids = next(tensor for tensor in graph.inputs if tensor.name == "input_ids")
    shape = insert(graph, "Shape", [ids], "bug/shape")
    batch = insert(graph, "Slice", [shape, *(gs.Constant(f"bug/{i}", np.array([i])) for i in (0, 1))], "bug/batch")
    large = insert(graph, "Greater", [batch, gs.Constant("bug/four", np.array([4]))], "bug/large")
    scales = [gs.Constant(f"bug/{x}", np.array([x], np.float32)) for x in (1.5, 1.0)]
    scale = insert(graph, "Where", [large, *scales], "bug/scale")
    rename_output(graph, logits, insert(graph, "Mul", [logits, scale], "bug/scaled"))
    folder = tmp_path_factory.mktemp("broken")
    save_graph(graph, folder / "model.onnx")
    return compile_model(source(folder / "model.onnx", tokenizer), RECIPE, folder / "build")


@pytest.fixture(scope="module")
def data(dense, tokenizer, tmp_path_factory):
    """60 texts with the dense model's own answers as labels, but for every sixth."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(4, 101, rng.integers(1, 12))) for _ in range(60)]
    run, encode = open_peer("dense-fp32", dense, 1), load_tokenizer(tokenizer).encode
    path = tmp_path_factory.mktemp("data") / "test.jsonl"
    with open(path, "w") as file:
        for i, text in enumerate(texts):
            answer = int(run(encode([text], 24))["logits"].argmax())
            file.write(json.dumps({"text": text, "label": "abc"[(answer + (i % 6 == 0)) % 3]}) + "\n")
    return path


def cli(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_build_without_passes_is_its_dense_model(build, data):
    found = validate(build, data=data, limits=Limits(max_error=1e-4, min_quality=0.8, max_drop=0))
    assert found.passed
    assert [each.output for each in found.outputs] == ["logits"]
    assert found.outputs[0].max_abs < 1e-4
    assert {(each.dims["batch"], each.padded) for each in found.comparisons} >= {(1, False), (6, True)}
    quality = found.quality
    assert (quality.samples, quality.dense, quality.compiled) == (60, 50 / 60, 50 / 60)
    assert (quality.difference, quality.agreement) == (0, 1)


def test_what_was_found_is_recorded(build, data):
    for wrong in ("nan", "inf"):
        assert CliRunner().invoke(app, ["validate", str(build.path), "--max-drop", wrong]).exit_code == 2
    with pytest.raises(ValueError, match="finite"):
        Limits(max_drop=float("nan"))
    with pytest.raises(InputError, match="samples is 0, not an integer of at least 1"):
        validate(build, data=data, samples=0)
    validate(build, data=data, samples=20, limits=Limits(max_error=1e-4))
    kept = open_build(build.path).measured.quality
    assert kept["passed"] is True
    assert kept["judged"] == "relative error at most 0.0001"
    assert kept["samples"] == 20
    assert kept["outputs"][0]["output"] == "logits"
    assert "relative_l2" in (build.path / "report.md").read_text()


def test_a_broken_build_is_caught_at_the_right_corner(broken, dense):
    found = validate(broken, dense=dense, limits=Limits(max_error=0.1))
    assert not found.passed
    assert found.outputs[0].dims["batch"] == 6
    assert found.outputs[0].relative_l2 == pytest.approx(0.5, abs=1e-4)
    assert all((each.relative_l2 > 0.1) == (each.dims["batch"] == 6) for each in found.comparisons)
    assert open_build(broken.path).measured.quality["passed"] is False


def test_the_command_exits_with_1_when_a_limit_is_broken(broken, dense, data):
    said = cli("validate", broken.path, "--dense", dense, "--max-error", 0.1)
    assert said.exit_code == 1
    assert "FAILED: output 'logits' at batch 6" in said.stdout
    assert cli("validate", broken.path, "--dense", dense, "--max-error", 0.6).exit_code == 0
    said = cli("validate", broken.path, "--dense", dense, "--data", data, "--min-quality", 0.9)
    assert said.exit_code == 1
    assert "classification quality 0.8333 is under 0.9" in said.stdout


def test_json_is_nothing_but_json(build, data):
    said = cli("validate", build.path, "--data", data, "--json")
    assert said.exit_code == 0
    found = json.loads(said.stdout)
    assert found["passed"] is None  # nobody asked
    assert (found["failures"], found["warnings"], found["judged"]) == ([], [], [])
    assert set(found["outputs"][0]) >= {"output", "max_abs", "mean_abs", "relative_l2", "cosine", "dims", "padded"}
    assert set(found["quality"]) >= {"kind", "samples", "dense", "compiled", "difference", "interval", "agreement"}


def test_a_limit_on_quality_needs_data(build):
    with pytest.raises(DataError, match="needs data"):
        validate(build, limits=Limits(min_quality=0.5))
    said = cli("validate", build.path, "--max-drop", 1)
    assert said.exit_code == 1
    assert "--data" in said.stderr


def test_a_label_that_is_no_class(build, tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"text": "w5", "label": "d"}\n')
    with pytest.raises(DataError, match="'d' is no class of the model; the model's are a, b, c"):
        validate(build, data=tmp_path / "odd.jsonl")


def test_a_shape_that_the_model_does_not_take(dense, tokenizer, tmp_path, monkeypatch):
    recipe = RECIPE | {"workload": {"batch": 2, "tokens": [8, 16, 2 * zoo.TEXT]}}
    build = compile_model(source(dense, tokenizer), recipe, tmp_path / "build")
    with pytest.raises(RecipeError, match=f"workload.tokens: {2 * zoo.TEXT} tokens are more than the "):
        validate(build)
    monkeypatch.setattr("trimtab.compiler.checks.validate.find_positions", lambda graph: None)
    with pytest.raises(TargetError, match=f"the dense model fails at batch 2, tokens {2 * zoo.TEXT}"):
        validate(build)


def test_tensors_bring_their_labels_along(tmp_path):
    path = zoo.exported("vit")
    run = open_peer("dense-fp32", path, 1)
    pixels = np.random.default_rng(0).normal(size=(20, 3, 24, 24)).astype(np.float32)
    labels = run({"pixel_values": pixels})["logits"].argmax(1)
    labels[:5] += 1
    np.savez(tmp_path / "images.npz", pixel_values=pixels, label=labels % 7)
    dataset, workload = read_data(tmp_path / "images.npz"), Workload(batch=(4, 6, 8))
    found = check_quality(run, run, load_graph(path), workload, source(path, None), dataset)
    assert (found.samples, found.dense) == (20, 0.75)
    assert check_quality(run, run, load_graph(path), workload, source(path, None), dataset, samples=7).samples == 7


def test_embeddings_of_texts(tokenizer, data):
    path = zoo.exported("distilbert")
    fp32, int8 = open_peer("dense-fp32", path, 1), open_peer("dense-int8", path, 1)
    dataset, graph = read_data(data), load_graph(path)
    same = check_quality(fp32, fp32, graph, Workload(), source(path, tokenizer), dataset)
    assert (same.mean_cosine, same.neighbour_overlap, same.spearman) == pytest.approx((1, 1, 1))
    near = check_quality(fp32, int8, graph, Workload(), source(path, tokenizer), dataset)
    assert 0.99 < near.mean_cosine < 1
    assert 0.5 < near.neighbour_overlap < 1
