"""Quality of scores and of several labels: against scikit-learn, scipy, and formulas written out in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from trimtab.compiler.checks.bounds import large_errors, poor_quality
from trimtab.compiler.checks.kinds.classes import Agreement, compare_classes
from trimtab.compiler.checks.kinds.labels import compare_labels
from trimtab.compiler.checks.kinds.scores import compare_scores, ndcg
from trimtab.compiler.checks.measure import OutputError
from trimtab.compiler.checks.perplexity import Perplexity
from trimtab.compiler.checks.quality import measure_quality
from trimtab.compiler.task import Task
from trimtab.passes.errors import DataError, TargetError

SEED = int(np.random.default_rng().integers(1 << 30))
SCORE = Task("score", "logits", "sigmoid")


@pytest.fixture
def rng() -> np.random.Generator:
    print(f"seed {SEED}")
    return np.random.default_rng(SEED)


def test_ndcg_by_its_formula(rng: np.random.Generator) -> None:
    for count in (2, 7, 40):
        labels = rng.choice([0.0, 0.0, 1.0, 2.0, 0.3], count) + np.eye(count)[0]
        scores = rng.permutation(count).astype(float)
        ranked = sorted(zip(scores, labels, strict=True), reverse=True)
        gain = sum(label / math.log2(i + 2) for i, (_, label) in enumerate(ranked[:10]))
        ideal = sum(label / math.log2(i + 2) for i, label in enumerate(sorted(labels, reverse=True)[:10]))
        assert ndcg(labels, scores) == pytest.approx(gain / ideal, rel=1e-12)


def test_ndcg_of_ties_is_the_mean_over_their_orders(rng: np.random.Generator) -> None:
    labels = rng.integers(0, 4, 6).astype(float) + np.eye(6)[5]
    scores = np.array([2.0, 2.0, 1.0, 1.0, 1.0, 3.0])
    orders = [order for order in itertools.permutations(range(6)) if (np.diff(scores[list(order)]) <= 0).all()]
    broken = [ndcg(labels[list(order)], -np.arange(6.0), 4) for order in orders]
    assert ndcg(labels, scores, 4) == pytest.approx(np.mean(broken), rel=1e-12)


def test_ndcg_and_f1_against_scikit_learn(rng: np.random.Generator) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    for count in (5, 12, 60):
        labels, scores = rng.integers(0, 3, count) + np.eye(count)[0], rng.integers(0, 8, count).astype(float)
        assert ndcg(labels, scores) == pytest.approx(metrics.ndcg_score([labels], [scores], k=10), rel=1e-12)
        truth, dense, compiled = rng.random((3, count, 6)) < 0.3
        quality = compare_labels(dense, compiled, truth)
        assert quality.dense == pytest.approx(metrics.f1_score(truth, dense, average="micro"), rel=1e-12)
        assert quality.compiled == pytest.approx(metrics.f1_score(truth, compiled, average="micro"), rel=1e-12)


def test_scores_against_scipy(rng: np.random.Generator) -> None:
    dense, labels = rng.normal(size=(50, 1)), rng.random((50, 1))
    compiled = dense + 0.4 * rng.normal(size=dense.shape)
    quality = compare_scores(dense, compiled, labels)
    assert quality.spearman == pytest.approx(spearmanr(dense[:, 0], compiled[:, 0]).statistic)
    assert quality.pearson == pytest.approx(pearsonr(dense[:, 0], compiled[:, 0]).statistic)
    assert quality.mean_error == pytest.approx(np.abs(dense - compiled).mean())
    assert quality.compiled_spearman == pytest.approx(spearmanr(labels[:, 0], compiled[:, 0]).statistic)
    assert quality.score == quality.compiled_spearman
    assert quality.drop == pytest.approx(100 * (quality.dense_spearman - quality.compiled_spearman))


def test_queries_are_ranked_each_for_itself(rng: np.random.Generator) -> None:
    queries = rng.permutation(np.repeat(np.arange(9), 8))
    labels, dense = rng.integers(0, 3, (72, 1)).astype(float), rng.normal(size=(72, 1))
    labels[queries == 3] = 1.0  # nothing to rank there
    compiled = dense + rng.normal(size=dense.shape)
    quality = compare_scores(dense, compiled, labels, queries.tolist())
    differ = [q for q in range(9) if np.ptp(labels[queries == q]) > 0]
    each = [[ndcg(labels[queries == q, 0], x[queries == q, 0]) for q in differ] for x in (dense, compiled)]
    assert quality.queries == len(differ) <= 8
    assert (quality.dense_ndcg, quality.compiled_ndcg) == pytest.approx(tuple(np.mean(each, axis=1)))
    assert quality.score == quality.compiled_ndcg
    assert quality.interval[0] < quality.difference < quality.interval[1]
    alone = compare_scores(dense, compiled, labels, list(range(72)))
    assert alone.dense_ndcg is None and alone.queries == 0 and alone.compiled_spearman is not None


def test_large_logits_keep_their_ranks() -> None:
    """The sigmoid of each is 1 in float32 and float64 alike."""
    logits = np.linspace(40, 90, 20, dtype=np.float32)[:, None]
    feeds = [{"x": logits}]
    same, turned = (lambda feed: {"logits": feed["x"]}), (lambda feed: {"logits": feed["x"][::-1]})
    assert measure_quality(feeds, same, same, task=SCORE).spearman == 1
    assert measure_quality(feeds, same, turned, task=SCORE).spearman == -1


def test_a_constant_answer_ranks_nothing(rng: np.random.Generator) -> None:
    dense = rng.normal(size=(20, 1))
    assert compare_scores(dense, np.zeros_like(dense)).spearman == 0
    assert compare_scores(np.ones_like(dense), np.ones_like(dense)).spearman == 1
    with pytest.raises(DataError, match="nothing to rank"):
        compare_scores(dense, dense, np.full((20, 1), 0.5))
    with pytest.raises(DataError, match="too few"):
        compare_scores(dense[:2], dense[:2])


def test_one_logit_is_a_score_and_never_a_class(rng: np.random.Generator) -> None:
    """The argmax of one logit always agrees."""
    feeds = [{"x": rng.normal(size=(20, 1))} for _ in range(3)]
    other = rng.normal(size=(20, 1))
    quality = measure_quality(feeds, lambda feed: {"logits": feed["x"]}, lambda feed: {"logits": other})
    assert quality.kind == "scores" and quality.score < 0.9


def test_the_sample_that_differs_most(rng: np.random.Generator) -> None:
    x = rng.normal(size=(12, 3))
    for task in (Task("classes", "logits", "softmax"), Task("labels", "logits", "sigmoid"), Task("score", "logits")):
        y = x + 1e-3
        y[7, 1] -= 5
        quality = measure_quality(
            [{"x": x[:5], "y": y[:5]}, {"x": x[5:], "y": y[5:]}],
            lambda feed: {"logits": feed["x"]}, lambda feed: {"logits": feed["y"]}, task=task,
        )  # fmt: skip
        assert quality.worst == 7


def test_nan_on_the_data_is_named(rng: np.random.Generator) -> None:
    x = rng.normal(size=(5, 1))
    nan = np.where(np.arange(5)[:, None] == 2, np.nan, x)
    with pytest.raises(TargetError, match="compiled model gives NaN"):
        measure_quality([{"x": x}], lambda _: {"logits": x}, lambda _: {"logits": nan}, task=SCORE)


def test_the_interval_of_micro_f1_covers_the_true_difference() -> None:
    rng, inside, rounds = np.random.default_rng(0), 0, 400  # other seeds miss these bounds once in some ten thousand
    true = None
    for size in (200_000, *[150] * rounds):
        truth = rng.random((size, 4)) < 0.3
        dense, compiled = truth ^ (rng.random(truth.shape) < 0.1), truth ^ (rng.random(truth.shape) < 0.15)
        quality = compare_labels(dense, compiled, truth)
        true = quality.difference if true is None else true
        inside += size == 150 and quality.interval[0] <= true <= quality.interval[1]
    assert 0.90 < inside / rounds <= 0.99


def test_labels_of_each_kind_of_error() -> None:
    truth = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1]], bool)
    compiled = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]], bool)
    quality = compare_labels(truth, compiled, truth, ["a", "b", "c"])
    assert (quality.dense, quality.compiled) == (1.0, 2 * 3 / (4 + 4))
    assert [row["compiled_error"] for row in quality.per_label] == [0.25, 0.25, 0.0]
    assert [row["positives"] for row in quality.per_label] == [2, 1, 1]
    assert quality.agreement == 10 / 12 and quality.drop == pytest.approx(25)
    nothing = np.zeros((4, 3), bool)
    assert compare_labels(nothing, nothing, nothing).score == 1
    assert compare_labels(truth, compiled).score == 10 / 12


def test_bounds_flag_what_nobody_would_ship(rng: np.random.Generator) -> None:
    def said(quality: object) -> str:
        return " ".join(poor_quality(quality, '"w1 w2"'))  # type: ignore[arg-type]

    def language(compiled: float) -> Perplexity:
        return Perplexity(samples=9, tokens=90, dense=10.0, compiled=compiled, agreement=0.9, divergence=0.1)

    assert not said(language(10.4))
    assert "56% higher" in said(language(15.6)) and '"w1 w2"' in said(language(15.6))
    labels = rng.integers(0, 3, 400)
    lost = np.where(np.arange(400) < 12, (labels + 1) % 3, labels)
    assert not said(compare_classes(labels, labels, labels))
    assert "accuracy is 3.00 points below dense" in said(compare_classes(labels, lost, labels))
    assert not said(compare_classes(labels[:60], np.r_[(labels[:1] + 1) % 3, labels[1:60]], labels[:60]))  # by chance
    assert "0.8900, below 0.9" in said(Agreement(samples=100, agreement=0.89))
    dense = rng.normal(size=(100, 1))
    assert not said(compare_scores(dense, dense + 0.01))
    assert "rank correlation" in said(compare_scores(dense, rng.normal(size=(100, 1))))


def test_an_error_counts_beside_the_size_of_the_output_over_all_shapes() -> None:
    def error(batch: int, relative: float, rms: float) -> OutputError:
        return OutputError(output="y", dims={"batch": batch}, padded=False, relative_l2=relative, rms=rms)

    assert not list(large_errors([error(1, 2.6, 0.01), error(8, 0.1, 1.0)]))  # one sample whose logits are near 0
    (said,) = large_errors([error(1, 0.1, 1.0), error(8, 0.9, 1.0)])
    assert "batch 8" in said and "off by 0.9" in said
