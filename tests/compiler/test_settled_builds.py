"""Builds of decoders whose attention rotates by tables: what they take, and what is still found in their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import zoo

from trimtab.compiler import compile_model, load, pipeline
from trimtab.passes.errors import InputError, TrimtabError


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save_pretrained("llama", tmp_path_factory.mktemp("settled") / "model")


def feeds(tokens: int) -> dict[str, np.ndarray]:
    past = {
        f"past_key_values.{layer}.{part}": np.zeros((1, 2, 0, 16), np.float32)
        for layer in range(2)
        for part in ("key", "value")
    }
    ids = np.arange(5, 5 + tokens)[None] % 131
    return past | {"input_ids": ids, "attention_mask": np.ones_like(ids)}


@pytest.mark.parametrize(
    ("workload", "most"),
    [
        ({"tokens": [1, 8, 100], "past": [0, 8, 20]}, 120),  # more than the model's 64
        ({"tokens": [1, 8, 30], "past": [0, 8, 20]}, 64),
    ],
)
def test_takes_what_the_workload_declares(llama: Path, workload: dict[str, Any], most: int, tmp_path: Path) -> None:
    build = compile_model(llama, {"passes": [], "threads": 1, "workload": {"batch": 1, **workload}}, tmp_path / "build")
    assert build.manifest.positions is not None
    assert build.manifest.positions.most == most
    engine = load(build.path)
    assert engine.run(feeds(most))["logits"].shape[:2] == (1, most)
    with pytest.raises(InputError, match=f"positions for {most}"):
        engine.run(feeds(most + 1))


def test_weights_that_a_pass_spoiled_are_found_before_they_are_joined(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pipeline.run_passes

    def spoiled(graph: gs.Graph, *given: Any) -> Any:
        results = real(graph, *given)
        scale = next(t for t in graph.tensors().values() if isinstance(t, gs.Constant) and t.name.endswith("0.scale"))
        scale.values = np.full(scale.shape, np.nan, np.float32)
        return results

    monkeypatch.setattr(pipeline, "run_passes", spoiled)
    recipe = {"passes": [{"weight-only": {"bits": 8}}], "threads": 1, "check": False}
    with pytest.raises(TrimtabError, match=r"weight-only/layer\.0.*NaN|NaN.*weight-only/layer\.0"):
        compile_model(llama, recipe, tmp_path / "build")
