"""benchmarks/lte.py: what it adds up and writes, without any model."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).resolve().parents[1] / "benchmarks"), *sys.path])


def test_the_union_of_a_batch() -> None:
    from routing.counted import union_growth

    seed = int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    rng, tokens, groups = np.random.default_rng(seed), 9, 7
    masks = rng.random((2, tokens, groups)) < 0.4
    choices = [np.full((tokens, groups), -1, np.int32) for _ in masks]
    for blocks, mask in zip(choices, masks, strict=True):
        for row, chosen in zip(blocks, mask, strict=True):
            row[: chosen.sum()] = np.nonzero(chosen)[0]
    found = union_growth(choices, groups, (1, 3, tokens))
    assert found[str(tokens)] == pytest.approx(masks.any(1).mean())
    assert found["1"] == pytest.approx(masks.mean(), abs=0.35)
    assert found["1"] <= found["3"] <= found[str(tokens)]


def test_articles_begin_with_a_heading_of_one_sign(tmp_path: Path) -> None:
    from routing.decoder import articles

    body = "some words of text , and more . " * 10
    text = f" \n = First = \n \n {body}\n \n = = Part = = \n \n {body}\n \n = Second = \n \n {body}\n"
    (tmp_path / "text.gz").write_bytes(gzip.compress(text.encode()))
    found = articles(tmp_path / "text.gz")
    assert [each.split(" = ")[0] for each in found] == ["= First", "= Second"]
    assert "= = Part = =" in found[0]


def test_curves_are_filled_with_what_is_asked_for() -> None:
    from routing.curves import CURVES

    from trimtab.compiler.recipe import load_recipe

    made = {curve.name: list(curve.builds(0.8, 8)) for curve in CURVES}
    assert made["threshold"][0][0] == [{"ffn-threshold": {"sparsity": 0.8, "most": 1.0}}]
    (fitted, _), *_ = made["moefication"]
    assert fitted[0]["ffn-route"] == {"router": "fitted", "sparsity": 0.8, "group": 8, "most": 1.0}
    assert any(passes[0]["ffn-topk"]["density"] == 0.2 for passes, _ in made["topk"])
    for builds in made.values():
        for passes, _ in builds:
            load_recipe({"passes": passes})


def test_results_of_several_runs_are_one(tmp_path: Path) -> None:
    from routing.tables import merged, tables

    point = {"dials": {"route_threshold": 0.5}, "default": True, "neurons": 0.2, "ffn": 0.23, "bytes": 0.21}
    quality = {"asked": 0.8, "equal_training": True, "dense_accuracy": 90.0}
    first = {"encoder": {"sst2": quality | {"curves": {"lte": [point | {"accuracy": 89.75, "beside": -0.25}]}}}}
    second = {"encoder": {"sst2": {"curves": {"threshold": [point | {"accuracy": 80.0, "beside": -10.0}]}}}}
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, results in zip(paths, (first, second), strict=True):
        path.write_text(json.dumps(results))
    whole: dict[str, Any] = merged(paths)
    assert set(whole["encoder"]["sst2"]["curves"]) == {"lte", "threshold"}
    (text,) = tables(whole)
    assert "| 20.0% | 23.0% | 21.0% | 89.75 % | -0.25 |" in text
    assert "| 80.00 % | -10.00 |" in text
