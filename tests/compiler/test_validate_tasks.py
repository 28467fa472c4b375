"""`validate` at tasks other than classes, and what it says where nobody asked for anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from heads import head_model, pairs, save_onnx, texts, torch_logits
from typer.testing import CliRunner

from trimtab.compiler.builds.build import Build
from trimtab.compiler.checks.validate import Limits, validate
from trimtab.compiler.cli.app import app
from trimtab.compiler.pipeline import compile_model
from trimtab.passes.errors import DataError
from trimtab.passes.graph import insert, load_graph, rename_output, save_graph

RECIPE = {"passes": [], "workload": {"batch": [1, 2, 4], "tokens": [1, 12, 48]}, "threads": 1, "check": False}
SEED = int(np.random.default_rng().integers(1 << 30))
NAMES = ["toxic", "spam", "threat", "insult"]


def spoil(onnx: Path, folder: Path) -> Path:
    """A copy of `onnx` whose logits have the other sign: random weights might by chance decide or rank much alike."""
    shutil.copytree(onnx.parent, folder)
    graph = load_graph(onnx)
    (logits,) = graph.outputs
    rename_output(graph, logits, insert(graph, "Neg", [logits], "spoiled"))
    save_graph(graph, folder / onnx.name)
    return folder / onnx.name


class Case:
    """A model, a build of it and one of a spoiled copy."""

    def __init__(self, folder: Path, **config: Any) -> None:
        print(f"seed {SEED}")
        self.folder, self.rng = folder, np.random.default_rng(SEED)
        self.model = head_model("bert", SEED, **config)
        self.dense = save_onnx(self.model, folder / "dense")
        self.exact = compile_model(self.dense, RECIPE, folder / "exact")
        self.bad = compile_model(spoil(self.dense, folder / "other"), RECIPE, folder / "bad")

    def data(self, records: list[dict[str, Any]]) -> Path:
        path = self.folder / f"{len(list(self.folder.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    def validate(self, build: Build, data: Path | None = None, **limits: float) -> Any:
        return validate(build, data=data, dense=self.dense, limits=Limits(**limits))

    def command(self, build: Build, *options: object) -> Any:
        arguments = ["validate", build.path, "--dense", self.dense, *options]
        return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("reranker"), num_labels=1)


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Case:
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    problem = "multi_label_classification"
    return Case(tmp_path_factory.mktemp("tagger"), num_labels=len(NAMES), problem_type=problem, **names)


def apart(scores: np.ndarray) -> np.ndarray:
    """Places of `scores` from the highest down, without those that are so near the one before that rounding counts."""
    order = np.argsort(-scores)
    found: np.ndarray = order[np.abs(np.diff(scores[order], prepend=np.inf)) > 1e-4 * np.ptp(scores)]
    return found


def ranked(case: Case, queries: int = 6, documents: int = 8) -> list[dict[str, Any]]:
    """Pairs with labels in the order of the dense model's scores, by transformers.

    Each label is half of the next one, so any other order costs NDCG. No two scores are so close that float
    rounding could swap them.
    """
    firsts = [f"w{number} {text}" for number, text in enumerate(texts(case.rng, queries, 5))]  # no two alike
    given = [(query, passage) for query in firsts for passage in texts(case.rng, 2 * documents, 60)]
    labels = {given[index]: 0.5**rank for rank, index in enumerate(apart(torch_logits(case.model, given)[:, 0]))}
    chosen = [[pair for pair in given if pair[0] == query and pair in labels][:documents] for query in firsts]
    return [{"query": a, "passage": b, "score": labels[a, b]} for pairs in chosen for a, b in pairs]


def test_a_reranker_ranks_as_transformers_says(reranker: Case) -> None:
    data = reranker.data(ranked(reranker))
    same = reranker.validate(reranker.exact, data, min_quality=0.99, max_drop=0.1, max_error=1e-3)
    assert same.passed and not same.warnings
    quality = same.quality
    assert (quality.kind, quality.samples, quality.queries) == ("scores", 48, 6)
    assert quality.dense_spearman > 0.9999 and quality.dense_ndcg > 0.9999  # token types and both texts reach the model
    assert same.judged[1:] == ("NDCG@10 at least 0.99", "NDCG@10 at most 0.1 points below dense")
    bad = reranker.validate(reranker.bad, data, min_quality=0.99)
    assert bad.passed is False and "NDCG@10" in bad.failures[0]


def test_the_second_text_changes_what_is_measured(reranker: Case) -> None:
    drawn = pairs(reranker.rng, 36)
    given = [drawn[place] for place in apart(torch_logits(reranker.model, drawn)[:, 0])[:24]]
    other = pairs(reranker.rng, 24)
    files = [
        reranker.data([{"text": a, "text_pair": b} for a, b in given]),
        reranker.data([{"text": a, "text_pair": b} for (a, _), (_, b) in zip(given, other, strict=True)]),
        reranker.data([{"text": a} for a, _ in given]),
    ]
    found = [reranker.validate(reranker.bad, data).quality.mean_error for data in files]
    assert np.diff(np.sort(found)).min() > 1e-6
    assert reranker.validate(reranker.exact, files[0]).quality.spearman == pytest.approx(1)
    with pytest.raises(DataError, match="without labels"):
        reranker.validate(reranker.exact, files[0], max_drop=1)


def test_without_limits_nothing_passed_and_what_is_bad_is_named(reranker: Case) -> None:
    records = ranked(reranker)
    data = reranker.data(records)
    said = reranker.command(reranker.exact, "--data", data)
    assert said.exit_code == 0 and "no limit was given" in said.stdout
    assert "passed" not in said.output and "warning" not in said.output
    said = reranker.command(reranker.bad, "--data", data)
    assert said.exit_code == 0 and "passed" not in said.stdout
    assert "warning: " in said.stderr and "rank correlation with the dense scores" in said.stderr
    assert any(record["query"][:20] in said.stderr for record in records) and "--min-quality" in said.stderr
    assert reranker.command(reranker.bad, "--data", data, "--strict").exit_code == 1
    printed = json.loads(reranker.command(reranker.bad, "--data", data, "--json").stdout)
    assert printed["passed"] is None and len(printed["warnings"]) >= 1 and printed["judged"] == []
    asked = reranker.command(reranker.bad, "--data", data, "--min-quality", -1)
    assert asked.exit_code == 0 and "passed: NDCG@10 at least -1" in asked.stdout and "warning" not in asked.stderr
    said = reranker.command(reranker.bad)
    assert "far from the dense model's" in said.stderr and "batch" in said.stderr


def test_several_labels(tagger: Case) -> None:
    drawn = texts(tagger.rng, 90, 40)
    clear = [place for place, row in enumerate(torch_logits(tagger.model, drawn)) if np.abs(row).min() > 1e-3][:60]
    sentences = [drawn[place] for place in clear]
    wanted = torch_logits(tagger.model, sentences) > 0
    named = [[name for name, has in zip(NAMES, row, strict=True) if has] for row in wanted]
    data = tagger.data([{"text": text, "label": label} for text, label in zip(sentences, named, strict=True)])
    same = tagger.validate(tagger.exact, data, min_quality=0.999, max_drop=0)
    assert same.passed and same.quality.dense == pytest.approx(1)
    bad = tagger.validate(tagger.bad, data)
    assert "micro-F1" in " ".join(bad.warnings)
    assert [row["label"] for row in bad.quality.per_label] == NAMES
    unlabelled = tagger.data([{"text": text} for text in sentences])
    assert tagger.validate(tagger.bad, unlabelled).quality.score == bad.quality.agreement < 0.95
    partly = tagger.data([{"text": text, "label": [] if i else None} for i, text in enumerate(sentences)])
    assert "1 of 60 samples" in tagger.validate(tagger.exact, partly).warnings[0]
    for labels, message in (([["toxic", "ham"]], "'ham' is no class"), ([1, 0], "is not a list"), ([0.5], "is not a")):
        with pytest.raises(DataError, match=message):
            tagger.validate(tagger.exact, tagger.data([{"text": "w1", "label": label} for label in labels]))


def test_tensors_with_scores(reranker: Case) -> None:
    ids = reranker.rng.integers(4, 90, (30, 9))
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": (np.arange(9) > 4) + 0 * ids}
    scores = load_scores(reranker, arrays)
    chosen = apart(scores)[:20]
    arrays, scores = {name: array[chosen] for name, array in arrays.items()}, scores[chosen]
    np.savez(reranker.folder / "tensors.npz", **arrays, label=scores)
    found = reranker.validate(reranker.exact, reranker.folder / "tensors.npz", min_quality=0.999)
    assert found.passed and found.quality.dense_spearman == pytest.approx(1)
    bad = reranker.validate(reranker.bad, reranker.folder / "tensors.npz")
    assert "sample" in bad.warnings[0]


def load_scores(case: Case, feeds: dict[str, np.ndarray]) -> np.ndarray:
    import torch

    with torch.no_grad():
        scores: np.ndarray = case.model(**{name: torch.tensor(value) for name, value in feeds.items()}).logits.numpy()
    return scores[:, 0]
