"""Builds of decoders, whoever exported them and whatever their workload and types: checked, and validated."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import zoo
from seeds import seeded

from trimtab.compiler import compile_model, load
from trimtab.compiler.builds.build import open_build
from trimtab.compiler.checks.bench import time_runs
from trimtab.compiler.checks.cost import Counter
from trimtab.compiler.checks.measured_cost import measure_cost
from trimtab.compiler.checks.perplexity import measure_perplexity
from trimtab.compiler.checks.validate import Limits, validate
from trimtab.compiler.feeds import converting, random_feeds, within
from trimtab.compiler.sources import Source
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner
from trimtab.compiler.workload import Workload
from trimtab.passes.errors import RecipeError
from trimtab.passes.graph import load_graph

OPTIMUM = {
    "batch": "batch_size", "tokens": "sequence_length", "past": "past_sequence_length",
    "total": "past_sequence_length + sequence_length",
}  # fmt: skip


def renamed(family: str, names: dict[str, str], folder: Path) -> Path:
    """The exported decoder with other names of its axes."""
    shutil.copytree(zoo.exported(family, "cached").parent, folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for value in [*model.graph.input, *model.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = names.get(dim.dim_param, dim.dim_param)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def dense_feeds(path: Path, **dims: int) -> dict[str, np.ndarray]:
    return random_feeds(load_graph(path), dims, seeded())


@pytest.mark.parametrize("exporter", ["genai", "optimum", "letters"])
def test_a_file_of_another_exporter_compiles_by_default(exporter: str, tmp_path: Path) -> None:
    if exporter == "genai":
        path = zoo.exported("llama", "genai")
    else:
        names = OPTIMUM if exporter == "optimum" else {name: name[0].upper() for name in OPTIMUM}
        path = renamed("qwen2", names, tmp_path / "model")
    build = compile_model(path, {"passes": [], "threads": 1}, tmp_path / "build")
    assert build.manifest.check.ran
    caches = [tensor.shape for tensor in build.manifest.inputs if tensor.name.startswith("past")]
    assert all(isinstance(size, int) for shape in caches for size in (shape[1], shape[3]))
    found = validate(build, limits=Limits(max_error=1e-5))
    assert found.passed, found.failures
    longest = zoo.TEXT if exporter == "genai" else 128
    assert {each.dims["tokens"] for each in found.comparisons} == {8, 48, longest}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build whose cache is in half precision."""
    recipe = {
        "passes": [{"precision": {"type": "float16", "io": True}}],
        "workload": {"batch": [1, 2, 3], "tokens": [4, 9, 16], "past": [0, 5, 11]},
        "threads": 1,
    }
    folder = tmp_path_factory.mktemp("half")
    tokenizer = zoo.save_pretrained("gpt2", folder / "model")
    source = Source("tiny", zoo.exported("gpt2", "cached"), tokenizer, labels=None, max_tokens=None, kind="onnx")
    compile_model(source, recipe, folder / "build")
    return folder / "build"


def test_a_cache_in_half_precision_is_checked(half: Path, tmp_path: Path) -> None:
    """Beside a dense model with a cache in float32: when it is compiled, validated, timed and counted."""
    build = open_build(half)
    assert build.manifest.check.ran
    engine = load(half)
    assert {tensor.dtype for tensor in engine.inputs if tensor.name.startswith("past")} == {"float16"}
    (tmp_path / "held.txt").write_text("w5 w6 w7\nw8 w9\n")  # shorter than the least of the workload
    found = validate(build, data=tmp_path / "held.txt", limits=Limits(max_error=0.05, min_quality=0.9))
    assert found.passed, found.failures
    assert {each.dims["past"] for each in found.comparisons} == {0, 5, 11}
    cost = measure_cost(build, data=tmp_path / "held.txt", seconds=0.01)
    assert cost.settings[0].flops > 0


def test_images_in_half_precision(tmp_path: Path) -> None:
    """Inputs in half precision without any cache, timed beside the dense model."""
    recipe = {
        "passes": [{"precision": {"type": "float16", "io": True}}],
        "workload": {"batch": [1, 2, 3]},
        "threads": 1,
    }
    path = zoo.exported("vit")
    build = compile_model(path, recipe, tmp_path / "build")
    engine = load(build.path)
    assert engine.inputs[0].dtype == "float16"
    assert validate(build, limits=Limits(max_error=0.05)).passed
    runs = {"compiled": converting(engine.run, engine.inputs), "dense": OnnxRuntimeRunner(path).run}
    times = time_runs(runs, load_graph(path), Workload(batch=2), [(2, 1)], seconds=0)
    assert {each.name for each in times[2, 1]} == {"compiled", "dense"}
    assert Counter(build.model)(dense_feeds(path, batch=2)).flops > 0


def test_perplexity_of_short_texts(tmp_path: Path) -> None:
    """Filled up to the least size of a workload, texts are as likely as alone."""
    path = zoo.exported("llama", "cached")
    run, workload = OnnxRuntimeRunner(path), Workload(batch=(4, 4, 4), tokens=(9, 9, 9))
    feeds = dense_feeds(path, batch=2, tokens=3)
    found = measure_perplexity([feeds], run.run, within(run.run, load_graph(path), workload))
    assert found.compiled == pytest.approx(found.dense, rel=1e-5)


def test_a_workload_of_no_call_that_attention_takes(tmp_path: Path) -> None:
    """Refused before anything is computed, not by the runtime at the end."""
    recipe = {"passes": [], "workload": {"batch": [2, 3, 4], "tokens": [2, 8, 9], "past": [1, 4, 8]}}
    with pytest.raises(RecipeError, match=r"several tokens behind a past for one row alone"):
        compile_model(zoo.exported("llama", "cached"), recipe, tmp_path / "build")
    assert not (tmp_path / "build").exists()
