from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from trimtab.compiler.checks.kinds.classes import Agreement, Classification, compare_classes
from trimtab.compiler.checks.kinds.embeddings import Embeddings, compare_embeddings, mean_pool
from trimtab.compiler.checks.quality import measure_quality
from trimtab.passes.errors import DataError, ModelError


def test_accuracy_difference_and_interval_by_hand():
    labels = np.zeros(100, int)
    dense, compiled = np.ones(100, int), np.ones(100, int)
    dense[:80] = 0
    compiled[:70] = 0  # 10 of dense's right ones are lost
    compiled[95:] = 0  # 5 of its wrong ones are gained
    found = compare_classes(dense, compiled, labels)
    assert (found.dense, found.compiled) == (0.80, 0.75)
    assert found.difference == pytest.approx(-0.05)
    assert found.agreement == 0.85
    # Agresti & Min: gained 5.5, lost 10.5, of 102: (16 - 25/102)^0.5 / 102 = 0.038914; -5/102 ± 1.96 of that
    assert found.interval == pytest.approx((-0.125291, 0.027251), abs=1e-5)


def test_the_interval_covers_the_true_difference_as_often_as_it_says():
    rng, inside, rounds = np.random.default_rng(0), 0, 1000
    for _ in range(rounds):
        cell = rng.choice(4, 200, p=(0.85, 0.05, 0.03, 0.07))  # both right, lost, gained, both wrong
        found = compare_classes(cell > 1, np.isin(cell, (1, 3)), np.zeros(200, bool))
        inside += found.interval[0] <= -0.02 <= found.interval[1]
    assert 0.92 < inside / rounds < 0.98


def test_embeddings_against_scipy():
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(40, 6))
    compiled = dense + 0.3 * rng.normal(size=dense.shape)
    found = compare_embeddings(dense, compiled)
    cosines, overlaps, ranks = [], [], []
    for i in range(40):
        rows = []
        for table in (dense, compiled):
            unit = table / np.linalg.norm(table, axis=1, keepdims=True)
            rows.append(np.delete(unit @ unit[i], i))
        overlaps.append(len(set(np.argsort(-rows[0])[:10]) & set(np.argsort(-rows[1])[:10])) / 10)
        ranks.append(spearmanr(*rows).statistic)
        cosines.append(dense[i] @ compiled[i] / np.linalg.norm(dense[i]) / np.linalg.norm(compiled[i]))
    assert found.mean_cosine == pytest.approx(np.mean(cosines))
    assert found.neighbour_overlap == pytest.approx(np.mean(overlaps))
    assert found.spearman == pytest.approx(np.mean(ranks))
    assert 0.2 < found.neighbour_overlap < 0.95


def test_identical_models_lose_nothing():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(30, 5))
    same = compare_embeddings(table, table)
    assert (same.mean_cosine, same.neighbour_overlap, same.spearman) == pytest.approx((1, 1, 1))
    guess = rng.integers(0, 3, 50)
    even = compare_classes(guess, guess, rng.integers(0, 3, 50))
    assert even.difference == 0
    assert even.agreement == 1
    assert even.interval[0] < 0 < even.interval[1]


def test_mean_pool_leaves_padding_out():
    hidden = np.array([[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]]])
    assert mean_pool(hidden, np.array([[1, 1, 0]])).tolist() == [[2.0, 3.0]]


def _model(output, value):
    return lambda feed: {output: value(feed["x"])}


def _feeds(count, size=4):
    rng = np.random.default_rng(0)
    return [{"x": rng.normal(size=(min(size, count - i), 3))} for i in range(0, count, size)]


def test_labels_follow_the_batches():
    feeds = _feeds(10)
    labels = [int(row.argmax()) for feed in feeds for row in feed["x"]]
    found = measure_quality(feeds, _model("logits", lambda x: x), _model("logits", lambda x: -x), labels)
    assert isinstance(found, Classification)
    assert (found.samples, found.dense, found.compiled) == (10, 1.0, 0.0)


def test_without_labels_only_agreement_is_known():
    found = measure_quality(_feeds(10), _model("logits", lambda x: x), _model("logits", lambda x: x), [0, None] * 5)
    assert isinstance(found, Agreement)
    assert found.agreement == 1


def test_tokens_in_padding_are_no_predictions():
    feed = {"attention_mask": np.array([[1, 1, 0]])}
    dense = np.eye(4)[[[0, 1, 2]]]
    compiled = np.eye(4)[[[0, 2, 3]]]
    found = measure_quality([feed], lambda _: {"logits": dense}, lambda _: {"logits": compiled})
    assert (found.samples, found.agreement) == (2, 0.5)


def test_sentence_embeddings_are_preferred_to_pooling():
    feeds = _feeds(12)
    both = lambda x: {"last_hidden_state": np.ones((len(x), 2, 3)), "sentence_embedding": x}  # noqa: E731
    found = measure_quality(feeds, lambda feed: both(feed["x"]), lambda feed: both(-feed["x"]))
    assert isinstance(found, Embeddings)
    assert found.mean_cosine == pytest.approx(-1)


def test_data_that_cannot_be_judged():
    logits = _model("logits", lambda x: x)
    with pytest.raises(DataError, match="no samples"):
        measure_quality([], logits, logits)
    with pytest.raises(DataError, match=r"outside 0\.\.2"):
        measure_quality(_feeds(4), logits, logits, [0, 1, 2, 3])
    other = _model("scores", lambda x: x)
    with pytest.raises(ModelError, match="scores"):
        measure_quality(_feeds(4), other, other)
    with pytest.raises(DataError, match="too few"):
        compare_embeddings(np.ones((2, 3)), np.ones((2, 3)))
