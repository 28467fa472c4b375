"""ffn-route: dense at the exact end of its dial; else the groups that routers choose, sample by sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import zoo
from packed_encoder import Encoder, exit_logits, stays
from rewrite import canonical, profile_of, session
from routes import CLEAR, chosen, ffn_of, profile_with, random_routers, routed, run, watch
from scipy.special import softmax
from seeds import seeded

from trimtab.passes import Capability, PassContext, pass_class, run_passes
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.early_exit import EarlyExit
from trimtab.passes.ffn_route.route import FFNRoute
from trimtab.passes.ffn_route.routers import Routers
from trimtab.passes.graph import save_graph
from trimtab.passes.lower import lower
from trimtab.passes.sampled_ffn import FFNWeights
from trimtab.passes.sparse_ffn import Rest
from trimtab.passes.token_prune import TokenPrune
from trimtab.passes.unpad import Unpad


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_exact_end_is_dense(family: str, tmp_path: Path) -> None:
    rng, path = seeded(), zoo.exported(family)
    graph = canonical(path)
    cut = {"cumulative": 0.9} if rng.integers(2) else {"threshold": 0.4}
    (result,) = routed(graph, random_routers(graph, rng, **cut), shared=bool(rng.integers(2)))
    assert result.changed == len(find_anatomy(canonical(path)).ffns) > 0
    save_graph(graph, tmp_path / "model.onnx")
    for batch, tokens in ((1, 1), (1, 9), (3, 17)):
        feeds = zoo.feeds(family, batch, tokens, rng)
        for dense, ours in zip(run(path, feeds), run(tmp_path / "model.onnx", feeds, 0.0), strict=True):
            np.testing.assert_allclose(ours, dense, rtol=1e-4, atol=2e-4 * np.abs(dense).max())


@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize("cut", [{"threshold": 0.5}, {"cumulative": 0.8}], ids=str)
@pytest.mark.parametrize("family", ["bert", "opt", "llama", "gpt2"])
def test_each_sample_by_its_own_dial(family: str, cut: dict[str, float], weights: str, tmp_path: Path) -> None:
    """Every FFN computes what numpy makes of its input and its router, of the groups that reach the sample's dial."""
    rng, graph = seeded(), canonical(zoo.exported(family))
    learned, ffns = random_routers(graph, rng, **cut), find_anatomy(graph).ffns
    dense = {ffn.layer: (ffn.x, FFNWeights(ffn), ffn.activation.name, ffn.gated) for ffn in ffns}
    routed(graph, learned, weights=weights)
    watch(graph, {layer: x for layer, (x, *_) in dense.items()}, tmp_path / "model.onnx")
    compared = 0
    for batch, tokens in ((1, 1), (3, 7), (16, 40)):
        dial = rng.choice([0.0, 0.2, 0.5, 0.9, 1.0], batch)
        found = run(tmp_path / "model.onnx", zoo.feeds(family, batch, tokens, rng), dial)
        for (layer, (_, w, activation, gated)), x, y in zip(dense.items(), found[::2], found[1::2], strict=True):
            x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
            groups, clear = chosen(learned, layer, x, np.repeat(dial, tokens))
            wanted = ffn_of(x, w, activation, gated, groups, weights == "int8")
            sure = clear > CLEAR
            compared += int(sure.sum())
            error = np.abs(y - wanted)[sure].max(initial=0)
            if weights == "int8" and len(x) > 1:  # several tokens are rounded to bytes
                assert np.linalg.norm((y - wanted)[sure]) <= 0.03 * np.linalg.norm(wanted[sure])
            else:
                assert error <= (2e-3 if weights == "int8" else 1e-5) * max(1, np.abs(wanted).max())
    assert compared > 100


@pytest.mark.parametrize("shared", [False, True])
def test_a_cap_takes_the_best_and_shared_what_any_token_needs(shared: bool, tmp_path: Path) -> None:
    rng, graph = seeded(), canonical(zoo.exported("llama"))
    learned = random_routers(graph, rng)
    ffn = find_anatomy(graph).ffns[0]
    x, weights = ffn.x, FFNWeights(ffn)
    routed(graph, learned, shared=shared, cap=0.4 if not shared else 1.0)
    graph.outputs = [x, graph.tensors()["ffn-route/layer.0/down.y"]]
    save_graph(graph, tmp_path / "model.onnx")
    x_, y = run(tmp_path / "model.onnx", zoo.feeds("llama", 1, 5, rng), 0.5)
    groups, clear = chosen(learned, 0, x_[0], 0.5)
    scores = x_[0].astype(np.float64) @ learned["router.0.weight"].T + learned["router.0.bias"]
    if shared:  # the best of all tokens, not of each: one token's best may be less than the dial
        highest = scores.max(0)
        wanted = np.broadcast_to((highest >= 0) | (highest == highest.max()), groups.shape)
    else:
        most = max(1, round(0.4 * scores.shape[1]))
        wanted = groups & (scores.argsort(1).argsort(1) >= scores.shape[1] - most)
    if clear.min() > CLEAR:
        np.testing.assert_allclose(y[0], ffn_of(x_[0], weights, "silu", True, wanted, False), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_packed_tokens_follow_their_samples(family: str, tmp_path: Path) -> None:
    """Behind unpad, a sample's answer in a batch, at its own dial, is that which it gets alone."""
    rng, path = seeded(), zoo.exported(family)
    graph = canonical(path)
    results = routed(graph, random_routers(graph, rng), Unpad())
    assert all(result.changed for result in results)
    save_graph(graph, tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    feeds = zoo.feeds(family, 4, 9, rng)
    real = feeds["attention_mask"][..., None] if run(path, feeds)[0].ndim == 3 else 1
    for dense, ours in zip(run(path, feeds), run(tmp_path / "model.onnx", feeds, 0.0), strict=True):
        np.testing.assert_allclose(ours * real, dense * real, rtol=1e-4, atol=2e-4 * np.abs(dense).max())
    dial = np.array([0.0, 0.45, 0.8, 1.0])
    (together,) = run(tmp_path / "model.onnx", feeds, dial)[:1]
    for place in range(4):
        one = {name: value[place : place + 1] for name, value in feeds.items()}
        (alone,) = run(tmp_path / "model.onnx", one, dial[place])[:1]
        np.testing.assert_allclose(together[place], alone[0], rtol=1e-3, atol=1e-4 * np.abs(together).max())


class RoutedEncoder(Encoder):
    """An encoder that computes what routers choose, in float64; `near`: how clear the closest choice was."""

    learned: dict[str, np.ndarray]
    rests: dict[int, Rest]
    dial = 0.0
    near: list[float]

    def _apply(self, x: np.ndarray, name: str) -> np.ndarray:
        layer, _, part = name.partition(".")
        if part == "up":
            self.groups, clear = chosen(self.learned, int(layer), x, self.dial)
            self.near.append(float(clear.min()))
            self.entered = x
        if part != "down":
            return super()._apply(x, name)
        y = super()._apply(x * np.repeat(self.groups, x.shape[1] // self.groups.shape[1], 1), name)
        rest = self.rests.get(int(layer))
        return y if rest is None else y + rest(self.entered, 1 - self.groups.mean(1))


@pytest.mark.parametrize("options", [{}, {"rest": {"rank": 4}}], ids=str)
def test_with_pruning_and_exits(options: dict[str, Any], tmp_path: Path) -> None:
    """All three dials differ from sample to sample; tokens and samples that leave take theirs with them."""
    rng = seeded()
    encoder = RoutedEncoder(int(rng.integers(1 << 30)))
    learned = random_routers(encoder.graph(), rng)
    encoder.learned, encoder.near, encoder.rests = learned, [], {}
    thresholds = np.array([0, *rng.uniform(0.05, 0.3, encoder.layers - 1)], np.float32)
    exits = encoder.exit(2, "light")
    graph, route = encoder.graph(), FFNRoute.model_validate(options)
    measured = profile_with(learned, **profile_of(graph).tensors)
    profile = profile_with({"thresholds": thresholds} | exits, "magic-pyramid", **measured.tensors)
    routers = Routers.of(learned)
    for ffn in find_anatomy(graph).ffns:
        rest = route._rest(ffn, routers.by_layer[ffn.layer], routers, profile, routers.default)
        if rest is not None:
            encoder.rests[ffn.layer] = rest
    assert bool(encoder.rests) is bool(options)
    passes = [TokenPrune(), route, EarlyExit(criterion="probability")]
    results = run_passes(graph, passes, PassContext(profile))
    assert [result.changed > 0 for result in results] == [True] * 3
    save_graph(graph, tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    engine, compared = session(tmp_path / "model.onnx"), 0
    for count in (0, 7, 7, 7):
        samples = [2 * rng.standard_normal((int(rng.integers(1, 20)), encoder.width)) for _ in range(count)]
        dials = {"prune": (0, 1.0, 2.0), "route_threshold": (0, 0.3, 0.6, 1.0), "exit_threshold": (-1.0, 0.4, 2.0)}
        given = {name: rng.choice(values, count) for name, values in dials.items()}
        wanted, kept = [], []
        for place, x in enumerate(samples):
            encoder.dial, encoder.near = given["route_threshold"][place], []

            def prune(received: np.ndarray, layer: int, factor: float = given["prune"][place]) -> np.ndarray:
                keep, clear = stays(received, float(np.float32(thresholds[layer] * factor)), False)
                encoder.near.append(clear)
                return keep

            states = encoder.states(x, prune)
            answer = exit_logits(exits, states[2], 2, "light")
            doubt, limit = 1 - float(softmax(answer).max()), given["exit_threshold"][place]
            if min([*encoder.near, abs(doubt - limit)]) > CLEAR:
                wanted.append(answer if doubt < limit else encoder.logits(states[-1]))
                kept.append(place)
        rows = np.concatenate([np.zeros((0, encoder.width)), *(samples[i] for i in kept)]).astype(np.float32)
        lengths = np.array([len(samples[i]) for i in kept], np.int32)
        feeds = {"lengths": lengths, "x": rows} | {n: v[kept].astype(np.float32) for n, v in given.items()}
        logits = engine.run(None, feeds)[0]
        np.testing.assert_allclose(logits, np.array(wanted).reshape(-1, 3), rtol=1e-3, atol=1e-3)
        compared += len(kept)
    assert compared > 5


@pytest.mark.parametrize("scales", ["row", "tensor"])
def test_dynamic_int8_behind_it(scales: str, tmp_path: Path) -> None:
    """Routers and attention become integers; rows of FFNs stay as the pass keeps them."""
    rng, path = seeded(), zoo.exported("bert")
    graph = canonical(path)
    context = PassContext(profile_with(random_routers(graph, rng)), Capability(row_scales=True))
    int8 = pass_class("dynamic-int8").model_validate({"scales": scales})
    results = run_passes(graph, [Unpad(), FFNRoute(weights="int8"), int8], context)
    assert all(result.changed for result in results)
    save_graph(graph, tmp_path / "model.onnx")
    feeds = zoo.feeds("bert", 3, 9, rng)
    for dense, ours in zip(run(path, feeds), run(tmp_path / "model.onnx", feeds, 0.0), strict=True):
        assert np.abs(ours - dense).max() <= 0.1 * np.abs(dense).max()


@pytest.mark.parametrize("family", ["bert", "opt", "llama"])
def test_in_standard_ops(family: str, tmp_path: Path) -> None:
    rng, graph = seeded(), canonical(zoo.exported(family))
    weights = str(rng.choice(["fp32", "int8"]))
    routed(graph, random_routers(graph, rng), weights=weights)
    save_graph(graph, tmp_path / "model.onnx")
    lower(graph)
    assert {node.domain or "" for node in graph.nodes} <= {"", "ai.onnx"}
    save_graph(graph, tmp_path / "lowered.onnx")
    for batch, tokens in ((1, 1), (2, 5)):
        feeds = zoo.feeds(family, batch, tokens, rng)
        one, two = (run(tmp_path / f"{name}.onnx", feeds, 0.0) for name in ("model", "lowered"))
        for want, got in zip(one, two, strict=True):
            rounded = 0.03 if weights == "int8" and batch > 1 else 3e-4  # kernels take bytes for several tokens
            assert np.linalg.norm(got - want) <= rounded * np.linalg.norm(want)


def test_what_stays_dense_says_why() -> None:
    rng, graph = seeded(), canonical(zoo.exported("llama"))
    learned = random_routers(graph, rng)
    some = {name: value for name, value in learned.items() if not name.startswith("router.1")}
    (result,) = routed(graph, some)
    assert [(left.where, left.why) for left in result.left] == [("layer 1 FFN", "the profile has no router of it")]
    graph = canonical(zoo.exported("llama"))
    profile = profile_with(learned, **profile_of(graph).tensors)
    states = profile.states(0)
    density = float(chosen(learned, 0, states, 0.5)[0].mean())
    for most, stays_dense in ((density - 0.02, True), (density + 0.02, False)):
        graph = canonical(zoo.exported("llama"))
        (result,) = run_passes(graph, [FFNRoute(most=most, layers=(0,))], PassContext(profile))
        assert bool(result.left) is stays_dense
        if stays_dense:
            assert f"more than {most:.0%}" in result.left[0].why
        else:
            assert result.details["layers"][0]["density"] == pytest.approx(density, abs=2e-3)


def test_orders_that_cannot_work() -> None:
    for early, late in ((FFNRoute(), TokenPrune()), (FFNRoute(), Unpad()), (EarlyExit(), FFNRoute())):
        assert early.bars(late)
