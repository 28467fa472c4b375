"""ffn-threshold: dense at the exact end of its dial; else the neurons whose activations reach a quantile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import zoo
from dialects import ACTIVATIONS
from packed_encoder import Encoder, exit_logits
from rewrite import canonical, profile_of, session
from scipy.special import softmax
from seeds import seeded

from trimtab.passes import Capability, PassContext, PassResult, pass_class, run_passes
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.early_exit import EarlyExit
from trimtab.passes.errors import PassError
from trimtab.passes.ffn_threshold.threshold import FFNThreshold
from trimtab.passes.graph import save_graph
from trimtab.passes.lower import lower
from trimtab.passes.profile import Profile
from trimtab.passes.sampled_ffn import SampledFFN, sample_ffn
from trimtab.passes.sparse_ffn.rows import quantize_rows
from trimtab.passes.token_prune import TokenPrune
from trimtab.passes.unpad import Unpad

CLEAR = 1e-5
"""How far sizes are from the threshold, relative to it, where float32 has to decide as float64 does."""
INT8 = 2e-3
"""The same where kernels round x to 16 bits."""


def left_out(graph: gs.Graph, profile: Profile, *before: Any, **options: Any) -> list[PassResult]:
    return run_passes(graph, [*before, FFNThreshold.model_validate(options)], PassContext(profile))


def run(path: Path, feeds: dict[str, np.ndarray], dial: Any = None) -> list[np.ndarray]:
    engine = session(path)
    if dial is not None:
        feeds = feeds | {"ffn_sparsity": np.full(len(next(iter(feeds.values()))), dial, np.float32)}
    return engine.run(None, {i.name: feeds[i.name] for i in engine.get_inputs()})  # type: ignore[no-any-return]


class Reference:
    """One FFN in float64, by the numbers of its layer."""

    def __init__(self, layer: SampledFFN, block: int, by: str, integers: bool = False) -> None:
        self.block, self.gated, self.act = block, layer.ffn.gated, ACTIVATIONS[layer.ffn.activation.name]
        self.true = [w.astype(np.float64) for w in layer.ups]
        self.ups = [self._rows(w.T, integers).T for w in layer.ups]
        self.biases = [0 if b is None else b.astype(np.float64) for b in layer.up_biases]
        self.down, self.shift = self._rows(layer.down, integers), layer.down_bias
        self.weight = np.ones(layer.ffn.d_ff)
        if by == "contribution":
            self.weight = np.linalg.norm(layer.down.astype(np.float64), axis=1)
            if self.gated:
                self.weight *= np.sqrt(np.square(layer.fit @ self.true[1] + self.biases[1]).mean(0))
        fit = self._sizes(layer.fit.astype(np.float64), self.true)
        self.count = fit.size
        self.ordered = np.sort(np.sort(fit, 1)[:, :-1], None)  # the best of a token is always computed

    @staticmethod
    def _rows(weight: np.ndarray, integers: bool) -> np.ndarray:
        q, scale = quantize_rows(np.ascontiguousarray(weight))
        return q * scale[:, None].astype(np.float64) if integers else weight.astype(np.float64)

    def _first(self, x: np.ndarray, ups: list[np.ndarray]) -> np.ndarray:
        return np.asarray(self.act(x @ ups[0] + self.biases[0]))

    def _sizes(self, x: np.ndarray, ups: list[np.ndarray]) -> np.ndarray:
        sizes = np.abs(self._first(x, ups)) * self.weight
        return sizes.reshape(len(x), -1, self.block).sum(-1)

    def threshold(self, share: float) -> float:
        """Of hundredths the size of which so many are not above it; in straight lines between them, and 0 at 0."""
        if share == 0:
            return 0.0
        lower = int(np.floor(round(share * 100, 6)))
        at = [
            0.0 if i == 0 else self.ordered[min(int(np.ceil(i / 100 * self.count - 1e-6)), len(self.ordered)) - 1]
            for i in (lower, min(lower + 1, 100))
        ]
        return float(at[0] + (share * 100 - lower) * (at[1] - at[0]))

    def chosen(self, x: np.ndarray, dials: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which blocks the tokens x compute at their dials; and how clear that is."""
        sizes = self._sizes(x, self.ups)
        thresholds = np.array([self.threshold(float(dial)) for dial in dials])[:, None]
        best = np.arange(sizes.shape[1]) == sizes.argmax(1)[:, None]
        ranked = np.sort(sizes, 1)
        clear = np.where(best, np.inf, np.abs(sizes - thresholds)).min(1)
        clear = np.minimum(clear, ranked[:, -1] - ranked[:, -2])
        clear = clear / np.maximum(ranked[:, -1], 1e-9)
        return (sizes > thresholds) | best | (dials == 0)[:, None], np.where(dials > 0, clear, 1.0)

    def output(self, x: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        h = self._first(x, self.ups)
        if self.gated:
            h = h * (x @ self.ups[1] + self.biases[1])
        return np.asarray((h * np.repeat(chosen, self.block, 1)) @ self.down + self.shift)


def block_of(graph: gs.Graph, rng: np.random.Generator, below: int = 9) -> int:
    """A size that divides the neurons of all FFNs."""
    neurons = [ffn.d_ff for ffn in find_anatomy(graph).ffns]
    return int(rng.choice([n for n in range(1, below) if all(count % n == 0 for count in neurons)]))


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_exact_end_is_dense(family: str, tmp_path: Path) -> None:
    rng, path = seeded(), zoo.exported(family)
    graph = canonical(path)
    options = {"block": block_of(graph, rng), "shared": bool(rng.integers(2)), "sparsity": 0.7}
    (result,) = left_out(graph, profile_of(graph), **options)
    assert result.changed == len(find_anatomy(canonical(path)).ffns) > 0
    save_graph(graph, tmp_path / "model.onnx")
    for batch, tokens in ((1, 1), (1, 9), (3, 17)):
        feeds = zoo.feeds(family, batch, tokens, rng)
        for dense, ours in zip(run(path, feeds), run(tmp_path / "model.onnx", feeds, 0.0), strict=True):
            np.testing.assert_allclose(ours, dense, rtol=1e-4, atol=2e-4 * np.abs(dense).max())


@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize("family", ["bert", "opt", "llama", "gpt2"])
def test_each_sample_by_its_own_dial(family: str, weights: str, tmp_path: Path) -> None:
    """Every FFN computes what numpy makes of its input, of the blocks whose size reaches the sample's quantile."""
    rng, graph = seeded(), canonical(zoo.exported(family))
    by = str(rng.choice(["magnitude", "contribution"]))
    profile = profile_of(graph, seed=int(rng.integers(1 << 30)))
    block = block_of(graph, rng, 8 if weights == "int8" else 9)  # int8 in blocks of 8: bytes, other choices
    layers = {ffn.layer: sample_ffn(ffn, profile) for ffn in find_anatomy(graph).ffns}
    dense = {number: (layer.ffn.x, Reference(layer, block, by, weights == "int8")) for number, layer in layers.items()}
    left_out(graph, profile, weights=weights, by=by, block=block, sparsity=0.6)
    tensors = graph.tensors()
    made = {
        layer: tensors.get(f"ffn-threshold/layer.{layer}/shift") or tensors[f"ffn-threshold/layer.{layer}/down.y"]
        for layer in dense
    }
    graph.outputs = [t for layer, (x, _) in dense.items() for t in (x, made[layer])]
    save_graph(graph, tmp_path / "model.onnx")
    compared, spared = 0, 0
    for batch, tokens in ((1, 1), (3, 7), (16, 40)):
        dial = rng.choice([0.0, 0.3, 0.455, 0.6, 0.97, 1.0], batch)
        found = run(tmp_path / "model.onnx", zoo.feeds(family, batch, tokens, rng), dial)
        for (_, ffn), x, y in zip(dense.values(), found[::2], found[1::2], strict=True):
            x, y = x.reshape(-1, x.shape[-1]).astype(np.float64), y.reshape(-1, y.shape[-1])
            chosen, clear = ffn.chosen(x, np.repeat(dial, tokens))
            wanted = ffn.output(x, chosen)
            sure = clear > (INT8 if weights == "int8" else CLEAR)
            compared, spared = compared + int(sure.sum()), spared + int((~chosen[sure]).sum())
            error = np.abs(y - wanted)[sure].max(initial=0)
            assert error <= (2e-3 if weights == "int8" else 1e-5) * max(1, np.abs(wanted).max())
    assert compared > 100 and spared > 100


@pytest.mark.parametrize("family", ["bert", "llama", "opt"])
def test_calibration_data_meet_the_sparsity(family: str) -> None:
    """Of the states that were fitted to, the share asked for is left out; the report tells that of others."""
    rng, graph = seeded(), canonical(zoo.exported(family))
    profile, block = profile_of(graph, states=2000, seed=int(rng.integers(1 << 30))), int(rng.choice([1, 4]))
    sparsity = float(rng.choice([0.3, 0.6, 0.85]))
    layers = [sample_ffn(ffn, profile) for ffn in find_anatomy(graph).ffns]
    references = [Reference(layer, block, "contribution") for layer in layers]
    assert all(layer.h_held_out.size and np.size(layer.yardstick) for layer in layers)  # read before the graph changes
    (result,) = left_out(graph, profile, sparsity=sparsity, block=block)
    for row, layer, reference in zip(result.details["layers"], layers, references, strict=True):
        fitted = 1 - reference.chosen(layer.fit.astype(np.float64), np.full(len(layer.fit), sparsity))[0].mean()
        zeros = (reference.ordered == 0).sum() / reference.count
        assert max(sparsity, zeros) - 1e-3 < fitted < max(sparsity, zeros) + 1e-3
        taken, _ = reference.chosen(layer.held_out.astype(np.float64), np.full(len(layer.held_out), sparsity))
        assert row["sparsity"] == pytest.approx(1 - taken.mean(), abs=2e-3)
        y = reference.output(layer.held_out.astype(np.float64), taken) - reference.shift
        assert row["error"] == pytest.approx(layer.error(y.astype(np.float32)), rel=0.02, abs=1e-4)
        assert row["read_bytes"] < row["dense_bytes"]


def test_zeros_of_relu_are_left_out_whatever_is_asked_for() -> None:
    graph = canonical(zoo.exported("opt"))
    (result,) = left_out(graph, profile_of(graph), sparsity=0.05)
    for row in result.details["layers"]:
        assert row["sparsity"] > 0.3 and row["error"] < 1e-6


def test_contributions_beat_magnitudes() -> None:
    """On a model whose neurons add differently much to the output."""
    rng = seeded()
    errors = {}
    for by in ("magnitude", "contribution"):
        graph = canonical(zoo.exported("llama"))
        down = find_anatomy(graph).ffns[0].down
        scale = np.exp(2 * np.random.default_rng(5).standard_normal((down.in_features, 1))).astype(np.float32)
        weight = np.asarray(down.weight.values)
        down.weight.values = weight * (scale.T if weight.shape[0] != down.in_features else scale)
        (result,) = left_out(graph, profile_of(graph, seed=int(rng.integers(4))), by=by, layers=(0,))
        errors[by] = result.details["layers"][0]["error"]
    assert errors["contribution"] < 0.5 * errors["magnitude"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_cap_takes_the_best_and_shared_what_any_token_needs(shared: bool, tmp_path: Path) -> None:
    rng, graph = seeded(), canonical(zoo.exported("llama"))
    profile = profile_of(graph)
    layer = sample_ffn(find_anatomy(graph).ffns[0], profile)
    x, reference = layer.ffn.x, Reference(layer, 1, "contribution")
    left_out(graph, profile, shared=shared, cap=0.25 if not shared else 1.0)
    graph.outputs = [x, graph.tensors()["ffn-threshold/layer.0/down.y"]]
    save_graph(graph, tmp_path / "model.onnx")
    x_, y = run(tmp_path / "model.onnx", zoo.feeds("llama", 1, 5, rng), 0.5)
    states = x_[0].astype(np.float64)
    chosen, clear = reference.chosen(states, np.full(5, 0.5))
    if shared:
        wanted = np.broadcast_to(chosen.any(0), chosen.shape)
    else:
        sizes = reference._sizes(states, reference.ups)
        wanted = chosen & (sizes.argsort(1).argsort(1) >= sizes.shape[1] - round(0.25 * sizes.shape[1]))
        assert wanted.sum() < chosen.sum()
    if clear.min() > CLEAR:
        np.testing.assert_allclose(y[0], reference.output(states, wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_packed_tokens_follow_their_samples(family: str, tmp_path: Path) -> None:
    """Behind unpad, a sample's answer in a batch, at its own dial, is that which it gets alone."""
    rng, path = seeded(), zoo.exported(family)
    graph = canonical(path)
    results = left_out(graph, profile_of(graph), Unpad())
    assert all(result.changed for result in results)
    save_graph(graph, tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    feeds = zoo.feeds(family, 4, 9, rng)
    real = feeds["attention_mask"][..., None] if run(path, feeds)[0].ndim == 3 else 1
    for dense, ours in zip(run(path, feeds), run(tmp_path / "model.onnx", feeds, 0.0), strict=True):
        np.testing.assert_allclose(ours * real, dense * real, rtol=1e-4, atol=2e-4 * np.abs(dense).max())
    dial = np.array([0.0, 0.3, 0.77, 1.0])
    (together,) = run(tmp_path / "model.onnx", feeds, dial)[:1]
    for place in range(4):
        one = {name: value[place : place + 1] for name, value in feeds.items()}
        (alone,) = run(tmp_path / "model.onnx", one, dial[place])[:1]
        np.testing.assert_allclose(together[place], alone[0], rtol=1e-3, atol=1e-4 * np.abs(together).max())


class SparedEncoder(Encoder):
    """An encoder that leaves neurons out, in float64; `near`: how clear the closest choice was."""

    references: dict[int, Reference]
    dial = 0.0
    near: list[float]

    def _apply(self, x: np.ndarray, name: str) -> np.ndarray:
        layer, _, part = name.partition(".")
        if part == "up":
            self.chosen, clear = self.references[int(layer)].chosen(x, np.full(len(x), self.dial))
            self.near.append(float(clear.min()))
        if part == "down":
            x = x * np.repeat(self.chosen, x.shape[1] // self.chosen.shape[1], 1)
        return super()._apply(x, name)


def test_with_pruning_and_exits(tmp_path: Path) -> None:
    """Samples that leave early take their dials with them; those that go on are computed by their own."""
    rng = seeded()
    encoder = SparedEncoder(int(rng.integers(1 << 30)))
    graph = encoder.graph()
    profile = profile_of(graph, seed=int(rng.integers(1 << 30)))
    encoder.references = {
        ffn.layer: Reference(sample_ffn(ffn, profile), 2, "contribution") for ffn in find_anatomy(graph).ffns
    }
    encoder.near, exits = [], encoder.exit(2, "light")
    learned = {"thresholds": np.zeros(encoder.layers, np.float32)} | exits
    profile.tensors |= {f"learned.magic-pyramid.{name}": value for name, value in learned.items()}
    passes = [TokenPrune(), FFNThreshold(block=2), EarlyExit(criterion="probability")]
    results = run_passes(graph, passes, PassContext(profile))
    assert [result.changed > 0 for result in results[1:]] == [True] * 2
    save_graph(graph, tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    engine, compared, limit = session(tmp_path / "model.onnx"), 0, 0.4
    for count in (0, 7, 7, 7):
        samples = [2 * rng.standard_normal((int(rng.integers(1, 20)), encoder.width)) for _ in range(count)]
        given = rng.choice([0.0, 0.3, 0.6, 1.0], count)
        wanted, kept = [], []
        for place, x in enumerate(samples):
            encoder.dial, encoder.near = given[place], []
            states = encoder.states(x)
            answer = exit_logits(exits, states[2], 2, "light")
            doubt = 1 - float(softmax(answer).max())
            if min([*encoder.near, abs(doubt - limit)]) > CLEAR:
                wanted.append(answer if doubt < limit else encoder.logits(states[-1]))
                kept.append(place)
        rows = np.concatenate([np.zeros((0, encoder.width)), *(samples[i] for i in kept)]).astype(np.float32)
        feeds = {
            "lengths": np.array([len(samples[i]) for i in kept], np.int32), "x": rows,
            "prune": np.zeros(len(kept), np.float32), "exit_threshold": np.full(len(kept), limit, np.float32),
            "ffn_sparsity": given[kept].astype(np.float32),
        }  # fmt: skip
        logits = engine.run(None, feeds)[0]
        np.testing.assert_allclose(logits, np.array(wanted).reshape(-1, 3), rtol=1e-3, atol=1e-3)
        compared += len(kept)
    assert compared > 5


@pytest.mark.parametrize("scales", ["row", "tensor"])
def test_dynamic_int8_behind_it(scales: str, tmp_path: Path) -> None:
    """What is computed whole becomes integers; rows of FFNs stay as the pass keeps them."""
    rng, path = seeded(), zoo.exported("bert")
    graph = canonical(path)
    context = PassContext(profile_of(graph), Capability(row_scales=True))
    int8 = pass_class("dynamic-int8").model_validate({"scales": scales})
    results = run_passes(graph, [Unpad(), FFNThreshold(), int8], context)
    assert all(result.changed for result in results)
    save_graph(graph, tmp_path / "model.onnx")
    feeds = zoo.feeds("bert", 3, 9, rng)
    for dense, ours in zip(run(path, feeds), run(tmp_path / "model.onnx", feeds, 0.0), strict=True):
        assert np.abs(ours - dense).max() <= 0.1 * np.abs(dense).max()


@pytest.mark.parametrize("family", ["bert", "opt", "llama"])
def test_in_standard_ops(family: str, tmp_path: Path) -> None:
    rng, graph = seeded(), canonical(zoo.exported(family))
    weights, block = str(rng.choice(["fp32", "int8"])), block_of(graph, rng)
    left_out(graph, profile_of(graph), weights=weights, block=block)
    save_graph(graph, tmp_path / "model.onnx")
    lower(graph)
    assert {node.domain or "" for node in graph.nodes} <= {"", "ai.onnx"}
    save_graph(graph, tmp_path / "lowered.onnx")
    for batch, tokens in ((1, 1), (2, 5)):
        feeds = zoo.feeds(family, batch, tokens, rng)
        one, two = (run(tmp_path / f"{name}.onnx", feeds, 0.0) for name in ("model", "lowered"))
        for want, got in zip(one, two, strict=True):
            in_bytes = weights == "int8" and block >= 8 and batch > 1  # as kernels take several tokens
            assert np.linalg.norm(got - want) <= (0.03 if in_bytes else 3e-4) * np.linalg.norm(want)


def test_what_cannot_be_done_is_refused() -> None:
    graph = canonical(zoo.exported("bert"))
    with pytest.raises(PassError, match=r"sparsity: layer 0 FFN can leave out 50\.0% of .*its 2 blocks at least"):
        left_out(graph, profile_of(graph), sparsity=0.8, block=40)
    with pytest.raises(PassError, match="the profile has no statistics") as error:
        left_out(canonical(zoo.exported("bert")), Profile(profile_of(graph).info))
    assert "calibrate" in str(error.value.hint)
    with pytest.raises(PassError, match="a profile is needed"):
        run_passes(canonical(zoo.exported("bert")), [FFNThreshold()], PassContext())
    other = profile_of(canonical(zoo.exported("gpt2")))
    with pytest.raises(PassError, match="profile has 104 neurons, model has 80"):
        left_out(canonical(zoo.exported("bert")), other)


def test_what_stays_dense_says_why() -> None:
    graph = canonical(zoo.exported("llama"))
    (result,) = left_out(graph, profile_of(graph), block=5)
    assert {left.why for left in result.left} == {"blocks of 5 do not divide its 108 neurons"}
    graph = canonical(zoo.exported("llama"))
    (result,) = left_out(graph, profile_of(graph), most=0.3, sparsity=0.5)
    assert "more than 30%" in result.left[0].why
    assert [i.name for i in graph.inputs if i.name == "ffn_sparsity"] == []


def test_orders_that_cannot_work() -> None:
    for early, late in ((FFNThreshold(), TokenPrune()), (FFNThreshold(), Unpad()), (EarlyExit(), FFNThreshold())):
        assert early.bars(late)
