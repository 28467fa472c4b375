"""head-topk: dense at its exact end; candidates exact, the tail corrected, and the bounds true."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import zoo
from rewrite import canonical, head_profile, profile_of, run_part, session
from scipy.special import log_softmax
from scipy.stats import binom
from seeds import seeded

from trimtab.passes import PassContext, PassResult, run_passes
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.errors import PassError
from trimtab.passes.graph import save_graph
from trimtab.passes.head_topk.cheap import CheapHead, Head, LikeliestRanks, divergence, rank_likeliest
from trimtab.passes.head_topk.topk import HeadTopK


def rewrite(graph: gs.Graph, **options: object) -> PassResult:
    return run_passes(graph, [HeadTopK.model_validate(options)], PassContext(head_profile(graph)))[0]


def outputs(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    run = session(path)
    return run.run(None, {i.name: feeds[i.name] for i in run.get_inputs()})  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", zoo.DECODERS)
@pytest.mark.parametrize("exact", ["all", "prompt"])
def test_exact_end_equals_dense(family: str, exact: str, tmp_path: Path) -> None:
    path = zoo.exported(family)
    graph, vocabulary = canonical(path), zoo.tiny_model(family).config.vocab_size
    options = {"take": vocabulary} if exact == "all" else {"take": 20, "rank": 8, "dense_above": 0}
    assert rewrite(graph, **options).changed == 1
    save_graph(graph, tmp_path / "head.onnx")
    rng = seeded()
    for batch, tokens in ((1, 1), (3, 9)):
        feeds = zoo.feeds(family, batch, tokens, rng)
        (dense,), (ours,) = outputs(path, feeds), outputs(tmp_path / "head.onnx", feeds)
        np.testing.assert_allclose(ours, dense, rtol=1e-4, atol=1e-4 * np.abs(dense).max())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_candidates_are_exact_and_the_tail_is_cheap(family: str, tmp_path: Path) -> None:
    graph = canonical(zoo.exported(family))
    anatomy = find_anatomy(graph)
    assert anatomy.head is not None
    linear = anatomy.head.linears[-1]
    head = Head(linear.w().astype(np.float32), linear.b())
    states = head_profile(graph).head(linear.in_features)
    held = np.arange(len(states)) % 5 == 4
    cheap, x_name, y_name = CheapHead.fit(head, states[~held], 8), linear.x.name, linear.y.name
    rewrite(graph, take=16, rank=8, dense_above=1000)
    x = states[held][:11]
    got = run_part(graph, x_name, y_name, x[None], tmp_path)[0]
    guess, exact = cheap(x), head(x)
    rows = np.argsort(-guess, axis=1, kind="stable")[:, :16]
    wanted = guess.copy()
    np.put_along_axis(wanted, rows, np.take_along_axis(exact, rows, 1), 1)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_the_tail_keeps_its_share_of_the_softmax() -> None:
    """Without the correction by variance, a low-rank tail has too little of it."""
    rng = seeded()
    states = rng.standard_normal((4000, 32)).astype(np.float32)
    head = Head(
        (rng.standard_normal((32, 3000)) * 0.35).astype(np.float32), rng.standard_normal(3000).astype(np.float32)
    )
    cheap = CheapHead.fit(head, states[1000:], 8)
    rest = head(states) - states @ cheap.left @ cheap.right
    plain = CheapHead(cheap.left, cheap.right, rest.mean(0))
    share = {}
    for name, guess in (("corrected", cheap), ("plain", plain)):
        exact, mixed = head(states[:1000]), guess(states[:1000])
        share[name] = float((np.logaddexp.reduce(mixed, 1) - np.logaddexp.reduce(exact, 1)).mean())
    assert abs(share["corrected"]) < 0.15
    assert share["plain"] < -0.5
    assert divergence(head, cheap, states[:200], 64) < divergence(head, plain, states[:200], 64)


def test_divergence_and_places_are_those_of_their_definition() -> None:
    """In float64, where no two logits are so near that the order of a sum ranks them."""
    rng = seeded()
    states = rng.standard_normal((150, 12))
    head = Head(rng.standard_normal((12, 90)), None)
    cheap = CheapHead.fit(head, states, 4)
    found = rank_likeliest(head, cheap, states)
    for i, x in enumerate(states):
        order = np.argsort(-cheap(x[None])[0], kind="stable")
        assert found.places[i] == 1 + int(np.flatnonzero(order == head(x[None])[0].argmax())[0])
    exact, mixed = head(states), cheap(states)
    for row, guess in zip(exact, mixed, strict=True):
        best = np.argsort(-guess)[:10]
        guess[best] = row[best]
    p, q = log_softmax(exact, -1), log_softmax(mixed, -1)
    assert divergence(head, cheap, states, 10) == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-6)


@pytest.mark.parametrize("truth", [0.003, 0.03, 0.2, 0.5])
def test_the_bound_holds_at_its_confidence(truth: float) -> None:
    """Over all that may be missed, the true probability lies above the bound once in twenty times at most."""
    count = 400
    missed = np.arange(count + 1)
    bounds = np.array([LikeliestRanks(np.repeat((99, 1), (n, count - n))).miss_bound(10) for n in missed])
    too_low = binom.pmf(missed, count, truth)[bounds < truth].sum()
    assert too_low <= 0.05
    assert too_low > 0.03 or truth < -np.log(0.05) / count  # no wider than numbers that are whole make it
    places = np.ones(400, int)
    assert LikeliestRanks(places).miss_bound(1) == pytest.approx(1 - 0.05 ** (1 / 400))
    assert binom.cdf(0, 400, LikeliestRanks(places).miss_bound(1)) == pytest.approx(0.05)


def test_a_bound_chooses_the_fewest_candidates() -> None:
    graph = canonical(zoo.exported("llama"))
    details = run_passes(graph, [HeadTopK(rank=16, miss=0.1)], PassContext(head_profile(graph, 2000)))[0].details
    assert details["miss_bound"] <= 0.1 and 1 <= details["computed"] < 131
    linear = find_anatomy(canonical(zoo.exported("llama"))).head.linears[-1]  # type: ignore[union-attr]
    head = Head(linear.w().astype(np.float32), linear.b())
    states = head_profile(canonical(zoo.exported("llama")), 2000).head(64)
    held = np.arange(len(states)) % 5 == 4
    found = rank_likeliest(head, CheapHead.fit(head, states[~held], 16), states[held])
    assert found.miss_bound(details["computed"] - 1) > 0.1


def test_a_tied_table_lies_on_disk_once(tmp_path: Path) -> None:
    graph = canonical(zoo.exported("gemma"))
    head = find_anatomy(graph).head
    assert head is not None and head.tied
    rewrite(graph, take=16, rank=4)
    save_graph(graph, tmp_path / "head.onnx")
    big = [t for t in graph.tensors().values() if isinstance(t, gs.Constant) and sorted(t.shape or ()) == [40, 139]]
    assert len(big) == 1 and {node.op for node in big[0].outputs} == {"Gather", "SparseHead"}


@pytest.mark.parametrize(("weights", "tolerance"), [("fp16", 2e-3), ("bf16", 2e-2), ("int8", 3e-2), ("int4", 0.3)])
def test_weights_in_every_form(weights: str, tolerance: float, tmp_path: Path) -> None:
    path = zoo.exported("llama")
    graph = canonical(path)
    rewrite(graph, take=131, weights=weights)
    save_graph(graph, tmp_path / "head.onnx")
    feeds = zoo.feeds("llama", 2, 5, seeded())
    (dense,), (ours,) = outputs(path, feeds), outputs(tmp_path / "head.onnx", feeds)
    assert 0 < np.linalg.norm(ours - dense) < tolerance * np.linalg.norm(dense)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"take": 132}, "132 candidates of a vocabulary of 131"), ({"miss": 1e-5, "rank": 4}, "show no bound below")],
)
def test_refuses(options: dict[str, object], says: str) -> None:
    with pytest.raises(PassError, match=says):
        rewrite(canonical(zoo.exported("llama")), **options)


def test_a_head_that_loses_too_much_is_refused_unless_it_is_wanted() -> None:
    """By its own measure on held-out states; the bound is the recipe's."""
    graph = canonical(zoo.exported("llama"))
    profile = head_profile(graph, 400)
    options = {"take": 1, "rank": 1, "most": 1.0}
    measured = run_passes(graph.copy(), [HeadTopK(**options, max_divergence=None)], PassContext(profile))[0]
    nats = measured.details["divergence"]
    assert measured.changed == 1 and nats > 0
    with pytest.raises(PassError, match=r"nats a token from the dense distribution.*more than"):
        run_passes(graph.copy(), [HeadTopK(**options, max_divergence=nats * 0.9)], PassContext(profile))
    assert run_passes(graph, [HeadTopK(**options, max_divergence=nats * 1.1)], PassContext(profile))[0].changed == 1


def test_an_integer_head_raises_the_opset(tmp_path: Path) -> None:
    graph = canonical(zoo.exported("llama", "torchscript"))
    assert graph.opset < 21
    (result,) = run_passes(graph, [HeadTopK(take=8, rank=16, form="int4")], PassContext(head_profile(graph, 200)))
    assert result.changed
    save_graph(graph, tmp_path / "head.onnx")
    onnx.checker.check_model(tmp_path / "head.onnx", full_check=True)


def test_needs_states_of_the_head() -> None:
    graph = canonical(zoo.exported("llama"))
    with pytest.raises(PassError, match="no states of the head"):
        run_passes(graph, [HeadTopK(take=8)], PassContext(profile_of(graph)))


def test_a_classifier_is_left_as_it_is() -> None:
    graph = canonical(zoo.exported("bert"))
    result = run_passes(graph, [HeadTopK(take=2)], PassContext(profile_of(graph)))[0]
    assert result.changed == 0 and "no vocabulary" in result.left[0].why
