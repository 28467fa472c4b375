"""The rest: the map of least error for what is left out, by hand; nothing where all is computed; in every form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import sharing
import zoo
from rewrite import canonical, profile_of, session
from routes import chosen, profile_with, random_routers
from seeds import seeded

from trimtab.compiler.recipe import load_recipe
from trimtab.passes import Capability, Pass, PassContext, pass_class, run_passes
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.errors import PassError, ProfileError, RecipeError
from trimtab.passes.ffn_route.route import FFNRoute
from trimtab.passes.ffn_threshold.threshold import FFNThreshold
from trimtab.passes.ffn_topk.topk import FFNTopK
from trimtab.passes.graph import save_graph
from trimtab.passes.lower import lower
from trimtab.passes.matrices.regress import Moments
from trimtab.passes.profile import Profile
from trimtab.passes.sampled_ffn import SampledFFN
from trimtab.passes.sparse_ffn import Rest, fit_rest
from trimtab.passes.sparse_ffn.rest import RIDGES
from trimtab.passes.unpad import Unpad

CLEAR = 1e-4
"""How far scores are from the dial, where float32 has to decide as float64 does."""


def with_states(graph: gs.Graph, learned: dict[str, np.ndarray]) -> Profile:
    """Random states that are not around 0, so that what is left out is not, either, whatever the activation."""
    profile = profile_with(learned, **profile_of(graph).tensors)
    for name, value in profile.tensors.items():
        if name.endswith(".states"):
            profile.tensors[name] = value + np.float32(0.7)
    return profile


def layers_of(graph: gs.Graph) -> list[SampledFFN]:
    profile = with_states(graph, {})
    return [SampledFFN(ffn, profile.ffn(ffn.layer, ffn.d_ff, ffn.d_model)) for ffn in find_anatomy(graph).ffns]


def run(path: Path, feeds: dict[str, np.ndarray], dial: Any = None) -> list[np.ndarray]:
    engine = session(path)
    if dial is not None:
        value = np.full(len(next(iter(feeds.values()))), dial, np.float32)
        feeds = feeds | {"route_threshold": value, "ffn_sparsity": value}
    return engine.run(None, {i.name: feeds[i.name] for i in engine.get_inputs()})  # type: ignore[no-any-return]


def same(path: Path, other: Path, feeds: dict[str, np.ndarray], dial: Any = None) -> bool:
    """Whether a rewritten model gives the answers of the dense one at `path`."""
    pairs = zip(run(path, feeds), run(other, feeds, dial), strict=True)
    return all(np.allclose(ours, dense, rtol=1e-4, atol=2e-4 * np.abs(dense).max()) for dense, ours in pairs)


def missing(layer: SampledFFN, x: np.ndarray, computed: np.ndarray) -> np.ndarray:
    """What the blocks that are not computed add to the output, float64."""
    h = layer.hidden(x, layer.ups, layer.up_biases).astype(np.float64)
    return np.asarray((h * np.repeat(~computed, h.shape[1] // computed.shape[1], 1)) @ layer.down)


def test_weighted_moments() -> None:
    rng = seeded()
    x, y, w = rng.standard_normal((3000, 5)), rng.standard_normal((3000, 3)), rng.random(3000)
    found = Moments.of((x[:, :2], x[:, 2:]), y, w, np.float64)
    np.testing.assert_allclose(found.cov, np.cov(x.T, aweights=w, ddof=0), rtol=1e-9)
    both = np.cov(np.hstack([x, y]).T, aweights=w, ddof=0)
    np.testing.assert_allclose(found.cross, both[:5, 5:], rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(found.y_mean, np.average(y, axis=0, weights=w), rtol=1e-9)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_map_of_least_error(family: str) -> None:
    """Against the normal equations of all rows and an SVD of their outputs, both in float64."""
    rng = seeded()
    layer = layers_of(canonical(zoo.exported(family)))[0]
    groups, rank = 4, int(rng.integers(1, 9))
    plane = rng.standard_normal((layer.ffn.d_model, groups))
    shift = rng.standard_normal(groups)

    def computed(x: np.ndarray) -> np.ndarray:
        return x @ plane > shift  # some states compute all groups, some none

    rest = fit_rest(layer, computed, rank)
    assert rest is not None and rest.rank == rank
    taken = computed(layer.fit)
    share, y = 1 - taken.mean(1), missing(layer, layer.fit, taken)
    x, held_out = layer.fit.astype(np.float64), layer.held_out.astype(np.float64)
    mean = np.average(x, axis=0, weights=share**2)
    spread = np.average(np.square(x - mean), axis=0, weights=share**2)
    z = np.hstack([share[:, None] * (x - mean), share[:, None]])
    wrong = {}
    for ridge in RIDGES:
        penalty = np.append(ridge * spread, 0) * np.square(share).sum()
        full = np.linalg.solve(z.T @ z + np.diag(penalty), z.T @ y)
        outputs = z[:, :-1] @ full[:-1] * layer.gain
        directions = np.linalg.svd(outputs, full_matrices=False)[2][:rank]
        low = full[:-1] * layer.gain @ directions.T @ directions / layer.gain
        left_out = ~computed(layer.held_out)
        added = left_out.mean(1)[:, None] * ((held_out - mean) @ low + full[-1])
        wrong[ridge] = layer.error(layer.y_held_out - missing(layer, layer.held_out, ~left_out) + added)
        if ridge == rest.ridge:
            np.testing.assert_allclose(rest(layer.held_out, left_out.mean(1)), added, atol=1e-4 * np.abs(added).max())
    assert rest.error == pytest.approx(wrong[rest.ridge], rel=1e-3)
    at = RIDGES.index(rest.ridge)
    assert all(wrong[ridge] >= 0.999 * rest.error for ridge in RIDGES[max(0, at - 1) : at + 2])
    assert (
        rest.error
        < rest.error_without
        == pytest.approx(
            layer.error(layer.y_held_out - missing(layer, layer.held_out, computed(layer.held_out))), rel=1e-4
        )
    )


def test_nothing_to_win() -> None:
    layer = layers_of(canonical(zoo.exported("opt")))[0]
    assert fit_rest(layer, lambda x: np.ones((len(x), 4), bool), 4) is None
    layer.down = np.zeros_like(layer.down)  # what is left out is nothing, so no map is better than none
    assert fit_rest(layer, lambda x: np.zeros((len(x), 4), bool), 4) is None


@pytest.mark.parametrize("cut", [{"threshold": 0.5}, {"cumulative": 0.8}], ids=str)
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_routes_add_it_by_what_each_token_leaves_out(family: str, cut: dict[str, float], tmp_path: Path) -> None:
    rng, graph = seeded(), canonical(zoo.exported(family))
    learned = random_routers(graph, rng, **cut)
    profile, ffns = with_states(graph, learned), find_anatomy(graph).ffns
    step = FFNRoute.model_validate({"rest": {"rank": 6}, "cap": float(rng.choice([1.0, 0.7]))})
    rests = {ffn.layer: (ffn.x, *_rest_of(step, graph, profile, ffn.layer)) for ffn in ffns}
    (result,) = run_passes(graph, [step], PassContext(profile))
    assert result.changed == len(ffns)
    found = _added(graph, "ffn-route", {layer: x for layer, (x, *_) in rests.items()}, tmp_path)
    compared = 0
    for batch, tokens in ((1, 1), (3, 7), (8, 40)):
        dial = rng.choice([0.0, 0.2, 0.5, 0.9, 1.0], batch)
        values = run(tmp_path / "model.onnx", zoo.feeds(family, batch, tokens, rng), dial)
        for layer, x, added in zip(found, values[::2], values[1::2], strict=True):
            _, rest, most = rests[layer]
            x, added = x.reshape(-1, x.shape[-1]), added.reshape(-1, x.shape[-1])
            groups, clear = chosen(learned, layer, x, np.repeat(dial, tokens))
            share = 1 - np.minimum(groups.sum(1), most) / groups.shape[1]
            wanted = np.zeros(x.shape) if rest is None else rest(x.astype(np.float64), share)
            sure = clear > CLEAR
            compared += int(sure.sum())
            assert np.abs(added - wanted)[sure].max(initial=0) <= 1e-4 * max(1, np.abs(wanted).max())
            assert not added[sure & (share == 0)].any()
    assert compared > 100


def _rest_of(step: FFNRoute, graph: gs.Graph, profile: Profile, layer: int) -> tuple[Rest | None, int]:
    """What the pass will fit, and the most groups of a token."""
    from trimtab.passes.ffn_route.routers import Routers

    routers = Routers.of(profile.learned("lte"))
    ffn, router = find_anatomy(graph).ffns[layer], routers.by_layer[layer]
    return step._rest(ffn, router, routers, profile, routers.default), step.taken(router)


def _added(
    graph: gs.Graph, name: str, inputs: dict[int, gs.Tensor], folder: Path, more: dict[int, gs.Tensor] | None = None
) -> list[int]:
    """Let `graph` give the input of each FFN, what its rest adds, and `more`; returns the layers that have a rest."""
    tensors = graph.tensors()
    rests = {layer: tensors.get(f"{name}/layer.{layer}/with_rest") for layer in inputs}
    found = [layer for layer, tensor in rests.items() if tensor is not None]
    graph.outputs = []
    for layer in found:
        added = rests[layer].inputs[0].inputs[1]  # type: ignore[union-attr]
        inputs[layer].dtype = added.dtype = np.float32
        graph.outputs += [inputs[layer], added, *([more[layer]] if more is not None else [])]
    save_graph(graph, folder / "model.onnx")
    return found


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_thresholds_add_it_by_what_each_token_leaves_out(family: str, tmp_path: Path) -> None:
    rng, graph = seeded(), canonical(zoo.exported(family))
    step = FFNThreshold.model_validate({"rest": {"rank": 6}, "block": int(rng.choice([1, 4]))})
    layers = {layer.ffn.layer: layer for layer in layers_of(graph)}
    rests = {number: step._rest(layer, step._choose(layer)) for number, layer in layers.items()}
    inputs = {number: layer.ffn.x for number, layer in layers.items()}
    (result,) = run_passes(graph, [step], PassContext(with_states(graph, {})))
    chosen_of = {number: graph.tensors()[f"ffn-threshold/layer.{number}/blocks"] for number in layers}
    found = _added(graph, "ffn-threshold", inputs, tmp_path, chosen_of)
    assert found == [number for number, rest in rests.items() if rest is not None] and found
    for row in result.details["layers"]:
        assert row["layer"] not in found or row["error"] < row["error_without_rest"]
    for batch, tokens in ((1, 1), (5, 7)):
        dial = rng.choice([0.0, 0.2, 0.5, 0.9, 1.0], batch)
        values = run(tmp_path / "model.onnx", zoo.feeds(family, batch, tokens, rng), dial)
        for number, x, added, blocks in zip(found, values[::3], values[1::3], values[2::3], strict=True):
            rest, share = rests[number], (blocks < 0).mean(1)
            assert rest is not None
            wanted = rest(x.reshape(-1, x.shape[-1]).astype(np.float64), share).reshape(x.shape)
            np.testing.assert_allclose(added, wanted, rtol=0, atol=1e-4 * max(1, np.abs(wanted).max()))
            assert not share.reshape(batch, tokens)[dial == 0].any()


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_topk_adds_it_unless_all_is_computed(family: str, tmp_path: Path) -> None:
    rng, graph = seeded(), canonical(zoo.exported(family))
    step = FFNTopK.model_validate({"density": 0.2, "take": 0.3, "rank": 6, "dense_above": 6, "rest": {"rank": 5}})
    choices = [(layer, step._choose(layer)) for layer in layers_of(graph)]
    rests = [fit_rest(layer, choice.computed, 5) for layer, choice in choices]
    (result,) = run_passes(graph, [step], PassContext(with_states(graph, {})))
    whole = graph.copy()
    found = _added(graph, "ffn-topk", {layer.ffn.layer: layer.ffn.x for layer, _ in choices}, tmp_path)
    assert found == [layer.ffn.layer for layer, _ in choices]
    for batch, tokens in ((1, 1), (2, 3), (1, 7)):
        values = run(tmp_path / "model.onnx", zoo.feeds(family, batch, tokens, rng))
        for (_, choice), rest, x, added in zip(choices, rests, values[::2], values[1::2], strict=True):
            assert rest is not None
            blocks = len(choice.predictor.weight)
            share = np.full(batch * tokens, 1 - choice.take / blocks if batch * tokens <= 6 else 0)
            wanted = rest(x.reshape(-1, x.shape[-1]).astype(np.float64), share).reshape(x.shape)
            np.testing.assert_allclose(added, wanted, rtol=0, atol=1e-4 * max(1, np.abs(wanted).max()))
    save_graph(whole, tmp_path / "whole.onnx")
    for tokens, dense in ((7, True), (6, False)):
        assert same(zoo.exported(family), tmp_path / "whole.onnx", zoo.feeds(family, 1, tokens, rng)) is dense
    for row in result.details["layers"]:
        assert row["rest_rank"] == 5 and 0 < row["error"] < row["error_without_rest"]
        width = choices[row["layer"]][0].ffn.d_model
        assert row["rest_bytes"] == 4 * (2 * 5 * width + width)
        rows = row["bytes"] - row["rest_bytes"] - row["predictor_bytes"]
        assert 0.95 * row["dense_bytes"] < rows <= row["dense_bytes"]  # which counts biases


@pytest.mark.parametrize("family", ["bert", "vit", "opt", "gemma", "t5"])
def test_the_exact_end_is_dense(family: str, tmp_path: Path) -> None:
    rng, path = seeded(), zoo.exported(family)
    for name in ("ffn-route", "ffn-threshold", "ffn-topk"):
        graph = canonical(path)
        cut = {"cumulative": 0.9} if rng.integers(2) else {"threshold": 0.4}
        profile = with_states(graph, random_routers(graph, rng, **cut))
        options = {"density": 1} if name == "ffn-topk" else {"shared": bool(rng.integers(2))}
        step = pass_class(name).model_validate({"rest": {"rank": 4}, **options})
        (result,) = run_passes(graph, [step], PassContext(profile))
        ranks = [row["rest_rank"] for row in result.details["layers"]]
        assert ranks and (any(ranks) is (name == "ffn-route") or name == "ffn-threshold")  # zeros of ReLU need no rest
        save_graph(graph, tmp_path / "model.onnx")
        onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
        for batch, tokens in ((1, 1), (3, 17)):
            assert same(path, tmp_path / "model.onnx", zoo.feeds(family, batch, tokens, rng), 0.0)


def test_long_calls_of_capped_routes_are_dense(tmp_path: Path) -> None:
    rng, path = seeded(), zoo.exported("llama")
    graph = canonical(path)
    profile = with_states(graph, random_routers(graph, rng))
    run_passes(
        graph, [FFNRoute.model_validate({"rest": {"rank": 4}, "cap": 0.5, "dense_above": 5})], PassContext(profile)
    )
    save_graph(graph, tmp_path / "model.onnx")
    for tokens, dense in ((6, True), (5, False)):
        assert same(path, tmp_path / "model.onnx", zoo.feeds("llama", 1, tokens, rng), 0.5) is dense


@pytest.mark.parametrize("name", ["ffn-route", "ffn-threshold", "ffn-topk"])
def test_packed_tokens(name: str, tmp_path: Path) -> None:
    """Behind unpad, a sample's answer in a batch, at its own dial, is that which it gets alone."""
    rng, path = seeded(), zoo.exported("bert")
    graph = canonical(path)
    profile, step = with_states(graph, random_routers(graph, rng)), _steps(name)
    results = run_passes(graph, [Unpad(), step], PassContext(profile))
    assert all(result.changed for result in results)
    save_graph(graph, tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    feeds, dial = zoo.feeds("bert", 4, 9, rng), np.array([0.0, 0.45, 0.8, 1.0])
    (together,) = run(tmp_path / "model.onnx", feeds, dial)
    for place in range(4):
        one = {key: value[place : place + 1] for key, value in feeds.items()}
        (alone,) = run(tmp_path / "model.onnx", one, dial[place])
        np.testing.assert_allclose(together[place], alone[0], rtol=1e-3, atol=1e-4 * np.abs(together).max())
    nothing = {key: value[:0] for key, value in feeds.items()}
    assert run(tmp_path / "model.onnx", nothing, 0.5)[0].shape == (0, *together.shape[1:])


def _steps(name: str, **options: object) -> Pass:
    if name == "ffn-topk":
        options = {"density": 0.2, "take": 0.4, "rank": 8, "dense_above": 999, **options}
    return pass_class(name).model_validate({"rest": {"rank": 8}, **options})


@pytest.mark.parametrize("name", ["ffn-route", "ffn-threshold", "ffn-topk"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_in_standard_ops(name: str, family: str, tmp_path: Path) -> None:
    rng, graph = seeded(), canonical(zoo.exported(family))
    run_passes(graph, [_steps(name)], PassContext(with_states(graph, random_routers(graph, rng))))
    save_graph(graph, tmp_path / "model.onnx")
    lower(graph)
    assert {node.domain or "" for node in graph.nodes} <= {"", "ai.onnx"}
    save_graph(graph, tmp_path / "lowered.onnx")
    for batch, tokens in ((1, 1), (2, 5)):
        feeds = zoo.feeds(family, batch, tokens, rng)
        one, two = (run(tmp_path / f"{file}.onnx", feeds, 0.3) for file in ("model", "lowered"))
        for want, got in zip(one, two, strict=True):
            assert np.abs(got - want).max() <= 1e-3 * np.abs(want).max()


INT8_ROWS, INT8 = ("dynamic-int8", {"scales": "row"}), ("dynamic-int8", {"scales": "tensor"})
INT4, HALF = ("weight-only", {"block": 16, "parts": ("ffn", "attention")}), ("precision", {})
WITH_DIALS = [("bert", INT8_ROWS, 0.1), ("bert", INT8, 0.15), ("llama", INT4, 0.1), ("opt", HALF, 0.05)]


@pytest.mark.parametrize(
    ("name", "family", "later", "near"),
    [
        *(("ffn-route", *case) for case in WITH_DIALS),
        *(("ffn-threshold", *case) for case in WITH_DIALS),
        # which has no dial at which it computes all: integers in front of it change what it chooses
        *(("ffn-topk", *case) for case in [("llama", INT4, 0.1), ("opt", HALF, 0.05)]),
    ],
    ids=str,
)
def test_quantization_behind_it(
    name: str, family: str, later: tuple[str, dict[str, object]], near: float, tmp_path: Path
) -> None:
    rng, path = seeded(), zoo.exported(family)
    graph, capability = canonical(path), Capability(row_scales=True, weight_bits=frozenset({4, 8}))
    context = PassContext(with_states(graph, random_routers(graph, rng)), capability)
    before = run_passes(graph, [_steps(name, weights="int8")], context)
    save_graph(graph, tmp_path / "before.onnx")
    after = run_passes(graph, [pass_class(later[0]).model_validate(later[1])], context)
    assert before[0].changed and after[0].changed
    save_graph(graph, tmp_path / "model.onnx")
    feeds = zoo.feeds(family, 16, 9, rng)
    wanted, found = (run(tmp_path / f"{each}.onnx", feeds, 0.0) for each in ("before", "model"))
    for want, got in zip(wanted, found, strict=True):
        errors, sizes = (np.linalg.norm(each, axis=-1) for each in (got.astype(np.float32) - want, want))
        if name == "ffn-topk":  # rounding changes what a few tokens choose
            assert np.median(errors / sizes) <= near
        else:  # of all together, since the few logits of one sample may all be near 0
            assert np.linalg.norm(errors) <= near * np.linalg.norm(sizes)


@pytest.mark.parametrize("name", ["ffn-route", "ffn-topk"])
def test_in_half_where_the_target_computes_it(name: str, tmp_path: Path) -> None:
    rng, graph = seeded(), canonical(zoo.exported("llama"))
    context = PassContext(with_states(graph, random_routers(graph, rng)), Capability(float16=True))
    run_passes(graph, [_steps(name, dense_above=0)], context)
    save_graph(graph, tmp_path / "before.onnx")
    run_passes(graph, [pass_class("precision")()], context)
    halves = [node for node in graph.nodes if node.name.endswith(("/rest/left", "/rest/right"))]
    assert len(halves) == 4 and all(np.dtype(node.outputs[0].dtype) == np.float16 for node in halves)
    lower(graph)
    save_graph(graph, tmp_path / "model.onnx")
    feeds = zoo.feeds("llama", 2, 9, rng)
    (want,), (got,) = (run(tmp_path / f"{file}.onnx", feeds, 0.0) for file in ("before", "model"))
    assert np.abs(got - want).max() <= 1e-2 * np.abs(want).max()


def test_layers_that_share_weights_share_it(tmp_path: Path) -> None:
    rng = seeded()
    shape = sharing.Shape(gated=bool(rng.integers(2)))
    graph = canonical(sharing.write(tmp_path / "dense.onnx", shape, int(rng.integers(1 << 30))))
    (result,) = run_passes(graph, [_steps("ffn-topk")], PassContext(with_states(graph, {})))
    rows = result.details["layers"]
    assert len(rows) == shape.layers and [bool(row["rest_bytes"]) for row in rows] == [True, False, False, False]
    assert len({row["error"] for row in rows}) == 1
    names = [name for name in graph.tensors() if name.endswith("/rest/right.weight")]
    assert names == ["ffn-topk/layer.0/rest/right.weight"]


def test_what_is_refused() -> None:
    for options in ({"rank": 0}, {}, {"rank": 4, "ridge": 1}):
        with pytest.raises(RecipeError, match="rest"):
            load_recipe({"passes": [{"ffn-topk": {"rest": options}}]})
    with pytest.raises(RecipeError, match=r"rest: exact is for models that were trained to do without"):
        load_recipe({"passes": [{"ffn-topk": {"exact": True, "rest": {"rank": 4}}}]})
    for before, name in (([], "unpad"), (["unpad"], "token-prune")):
        with pytest.raises(RecipeError, match=f"its rest counts the tokens of a call, which {name} changes"):
            load_recipe({"passes": [*before, {"ffn-topk": {"rest": {"rank": 4}}}, name]})


def test_without_states() -> None:
    """Routes alone do without the states of FFNs; with a rest they need them."""
    graph = canonical(zoo.exported("bert"))
    learned = random_routers(graph, np.random.default_rng(0))
    bare = profile_with(learned)
    FFNRoute().check_profile(bare, [])
    for step in (FFNRoute.model_validate({"rest": {"rank": 4}}), FFNTopK()):
        with pytest.raises(ProfileError, match="no states of FFNs") as error:
            step.check_profile(profile_with(learned), [])
        assert "calibrate" in str(error.value.hint)
    recipe = load_recipe({"passes": [{"ffn-route": {"rest": {"rank": 4}}}]})
    assert len(recipe.needs) == 2 and len(load_recipe({"passes": ["ffn-route"]}).needs) == 1
    with pytest.raises(PassError, match="layer 1 FFN: the profile has no statistics"):
        profile = with_states(graph, learned)
        tensors = {name: value for name, value in profile.tensors.items() if not name.startswith("ffn.1.")}
        run_passes(graph, [FFNRoute.model_validate({"rest": {"rank": 4}})], PassContext(Profile(profile.info, tensors)))
