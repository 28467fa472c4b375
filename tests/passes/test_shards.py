"""Choices by shards: theory as simulation has it, budgets the least that hold, recall as reported."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import zoo
from rewrite import canonical, head_profile, profile_of
from seeds import seeded

from trimtab.passes import PassContext, PassResult, run_passes
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.ffn_topk.importance import importance, norms, places
from trimtab.passes.ffn_topk.shards import expected_recall
from trimtab.passes.ffn_topk.topk import FFNTopK
from trimtab.passes.head_topk.cheap import CheapHead, Head, divergence, rank_likeliest
from trimtab.passes.head_topk.topk import HeadTopK
from trimtab.passes.sampled_ffn import SampledFFN


def layers_of(graph: gs.Graph) -> list[SampledFFN]:
    profile = profile_of(graph)
    return [SampledFFN(ffn, profile.ffn(ffn.layer, ffn.d_ff, ffn.d_model)) for ffn in find_anatomy(graph).ffns]


def rewrite(graph: gs.Graph, shards: int, **options: object) -> PassResult:
    step = FFNTopK.model_validate({"most": 1.0, **options})
    return run_passes(graph, [step], PassContext(profile_of(graph), shards=shards))[0]


def selections(graph: gs.Graph) -> list[gs.Node]:
    return [node for node in graph.nodes if node.op == "SelectBlocks"]


@pytest.mark.parametrize(("n", "k", "shards"), [(12, 5, 3), (16, 8, 2), (18, 6, 3), (24, 3, 8), (20, 1, 4)])
def test_expected_recall_is_the_mean_over_all_that_may_be_wanted(n: int, k: int, shards: int) -> None:
    wanted = np.array(list(combinations(range(n), k)))  # each is as likely as any other
    counts = ((wanted // (n // shards))[:, :, None] == np.arange(shards)).sum(1)
    for local in range(1, n // shards + 1):
        found = np.minimum(counts, local).sum(1) / k
        assert expected_recall(n, k, shards, local) == pytest.approx(found.mean(), abs=1e-12)


def test_the_ends_of_expected_recall() -> None:
    assert expected_recall(64, 16, 1, 16) == pytest.approx(1)
    assert expected_recall(64, 16, 1, 4) == pytest.approx(0.25)
    assert expected_recall(64, 16, 4, 16) == pytest.approx(1)
    with pytest.raises(ValueError, match="3 shards do not divide 64"):
        expected_recall(64, 16, 3, 4)


def test_places_are_counted_in_each_shard() -> None:
    scores, truth = seeded().random((2, 50, 24))
    for shards in (1, 2, 4):
        found_at = places(scores, truth, 6, shards)
        for row in range(50):
            wanted = np.argpartition(-truth[row], 5)[:6]
            own = scores[row].reshape(shards, -1)
            rank = np.argsort(np.argsort(-own, axis=1), axis=1).reshape(-1) + 1
            assert sorted(rank[wanted]) == sorted(found_at[row])


@pytest.mark.parametrize(("family", "shards"), [("llama", 2), ("llama", 3), ("opt", 4)])
@pytest.mark.parametrize("options", [{"rank": 12}, {"predictor": "copy"}, {"rank": 12, "block": 2}], ids=str)
def test_recall_by_shards_is_true_and_its_budget_least(family: str, shards: int, options: dict[str, object]) -> None:
    graph = canonical(zoo.exported(family))
    step = FFNTopK.model_validate({"density": 0.2, "recall": 0.9, "most": 1.0, **options})
    blocks = find_anatomy(graph).ffns[0].d_ff // step.block
    if blocks % shards:
        pytest.skip("they do not divide")
    for layer in layers_of(graph):
        choice = step._choose(layer, shards=shards)
        assert choice.shards == shards and choice.take % shards == 0
        truth = importance(layer.h_held_out, norms(layer), step.block)
        scores = choice.predictor.scores(layer.held_out).reshape(len(truth), shards, -1)
        order = np.argsort(-scores, axis=2, kind="stable") + np.arange(shards)[:, None] * (blocks // shards)
        wanted = np.argsort(-truth, axis=1, kind="stable")[:, : choice.k]
        local = choice.take // shards
        recalls = []
        for taken in (order[:, :, :local], order[:, :, : local - 1]):
            pairs = zip(truth, wanted, taken.reshape(len(truth), -1), strict=True)
            recalls.append(np.mean([np.isin(w, t) | (row[w] == 0) for row, w, t in pairs]))
        assert recalls[0] == pytest.approx(choice.recall, abs=1e-6)
        assert recalls[0] >= 0.9
        assert recalls[1] < 0.9 or local == -(-choice.k // shards)


def test_the_graph_lets_each_shard_choose_and_the_report_says_so() -> None:
    graph = canonical(zoo.exported("llama"))
    rows = rewrite(graph, 2, density=0.2, predictor="copy", signal="both", recall=0.99).details["layers"]
    for row, node in zip(rows, selections(graph), strict=True):
        assert row["shards"] == node.attrs["shards"] == 2
        assert row["computed"] == node.attrs["k"] == 2 * row["of_each_shard"]
        assert row["recall"] >= 0.99
        assert row["expected_recall"] == pytest.approx(expected_recall(108, 22, 2, row["of_each_shard"]), abs=1e-4)
        # The predictor is perfect here: what is lost is lost to the division, as theory has it.
        assert abs(row["recall"] - row["expected_recall"]) < 0.05
        assert row["computed"] > row["wanted"]


def test_without_shards_the_report_has_no_more_columns() -> None:
    rows = rewrite(canonical(zoo.exported("llama")), 1, density=0.2, rank=12).details["layers"]
    assert not {"shards", "of_each_shard", "expected_recall"} & rows[0].keys()


def test_what_does_not_divide_is_chosen_among_all() -> None:
    graph = canonical(zoo.exported("opt"))  # 92 neurons
    rows = rewrite(graph, 3, density=0.2, rank=12).details["layers"]
    assert [row["shards"] for row in rows] == [1, 1, 1]
    assert [node.attrs["shards"] for node in selections(graph)] == [1, 1, 1]


def test_common_neurons_are_taken_however_they_fall_into_shards() -> None:
    graph = canonical(zoo.exported("llama"))
    step = FFNTopK(density=0.1, take=0.1, rank=4, common=0.3)
    for layer in layers_of(graph):
        choice = step._choose(layer, shards=4)
        common = choice.predictor.common
        assert common is not None
        assert choice.take // 4 >= np.bincount(common // 27, minlength=4).max() > 0.1 * 27
        scores = choice.predictor.scores(layer.held_out).reshape(-1, 4, 27)
        order = np.argsort(-scores, axis=2, kind="stable")[:, :, : choice.take // 4] + 27 * np.arange(4)[:, None]
        assert all(np.isin(common, row).all() for row in order.reshape(len(order), -1))


def test_candidates_by_shards_find_as_much() -> None:
    """In float64, where no two logits are so near that the order of a sum ranks them."""
    rng = seeded()
    states = rng.standard_normal((600, 16))
    head = Head(rng.standard_normal((16, 120)), rng.standard_normal(120))
    cheap = CheapHead.fit(head, states, 6)
    found = rank_likeliest(head, cheap, states, 3)
    exact, guess = head(states), cheap(states)
    for i in range(len(states)):
        best = int(exact[i].argmax())
        own = guess[i].reshape(3, 40)[best // 40]
        assert found.places[i] == 1 + int((own > own[best % 40]).sum())
    assert found.agreement(found.reaching(0.9)) >= 0.9 > found.agreement(found.reaching(0.9) - 1)
    mixed = guess.copy().reshape(-1, 40)
    rows = np.argsort(-mixed, axis=1)[:, :5]
    np.put_along_axis(mixed, rows, np.take_along_axis(exact.reshape(-1, 40), rows, 1), 1)
    p, q = (y - np.logaddexp.reduce(y, 1, keepdims=True) for y in (exact, mixed.reshape(exact.shape)))
    assert divergence(head, cheap, states, 15, 3) == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=1e-6)


def test_a_head_by_shards_agrees_no_less_than_one_choice_among_all() -> None:
    one = canonical(zoo.exported("gemma"))
    shared = canonical(zoo.exported("gemma"))
    profile = head_profile(one, 1500)
    options = {"take": 20, "rank": 8}
    details = [
        run_passes(graph, [HeadTopK.model_validate(options)], PassContext(profile, shards=shards))[0].details
        for graph, shards in ((one, 1), (shared, 139))  # a prime: every token is a shard of its own
    ]
    assert details[1]["shards"] == 139 and details[1]["of_each_shard"] == 1
    assert details[1]["agreement"] == 1 >= details[0]["agreement"]
    left = canonical(zoo.exported("gemma"))
    whole = run_passes(left, [HeadTopK.model_validate(options)], PassContext(profile, shards=2))[0].details
    assert whole["shards"] == 1 and selections(left)[0].attrs["shards"] == 1
    assert whole["agreement"] == details[0]["agreement"] and whole["computed"] == 20
