"""ffn-route with fitted routers: groups and routers that follow from calibration states, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import zoo
from dialects import ACTIVATIONS
from pydantic import ValidationError
from rewrite import canonical, profile_of, session
from seeds import seeded

from trimtab.passes import PassContext, PassResult, run_passes
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.errors import PassError
from trimtab.passes.ffn_route.fitted import contributions, fit
from trimtab.passes.ffn_route.route import FFNRoute
from trimtab.passes.graph import save_graph
from trimtab.passes.needs import FFNStates, Learned
from trimtab.passes.profile import Profile
from trimtab.passes.sampled_ffn import FFNWeights, sample_ffn

CLEAR = 1e-4
"""How far scores are from the threshold, where float32 has to decide as float64 does."""


def fitted(graph: gs.Graph, profile: Profile, **options: Any) -> PassResult:
    (result,) = run_passes(graph, [FFNRoute.model_validate({"router": "fitted"} | options)], PassContext(profile))
    return result


def run(path: Path, feeds: dict[str, np.ndarray], dial: Any = None) -> list[np.ndarray]:
    engine = session(path)
    if dial is not None:
        feeds = feeds | {"route_threshold": np.full(len(next(iter(feeds.values()))), dial, np.float32)}
    return engine.run(None, {i.name: feeds[i.name] for i in engine.get_inputs()})  # type: ignore[no-any-return]


def group_of(graph: gs.Graph, rng: np.random.Generator) -> int:
    """A size of groups, above 1, that divides the neurons of all FFNs into five groups at least."""
    neurons = find_anatomy(graph).ffns[0].d_ff
    return int(rng.choice([n for n in range(2, neurons // 5 + 1) if neurons % n == 0]))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "opt", "t5"])
def test_the_exact_end_is_dense(family: str, tmp_path: Path) -> None:
    rng, path = seeded(), zoo.exported(family)
    graph = canonical(path)
    options = {"group": group_of(graph, rng), "group_by": str(rng.choice(["need", "weights"]))}
    result = fitted(graph, profile_of(graph), **options)
    assert result.changed == len(find_anatomy(canonical(path)).ffns) > 0
    save_graph(graph, tmp_path / "model.onnx")
    for batch, tokens in ((1, 1), (3, 17)):
        feeds = zoo.feeds(family, batch, tokens, rng)
        for dense, ours in zip(run(path, feeds), run(tmp_path / "model.onnx", feeds, 0.0), strict=True):
            np.testing.assert_allclose(ours, dense, rtol=1e-4, atol=2e-4 * np.abs(dense).max())


@pytest.mark.parametrize("family", ["bert", "llama", "opt"])
def test_groups_are_neurons_of_the_model(family: str, tmp_path: Path) -> None:
    """Each FFN computes the neurons of the groups that its router chooses, wherever the model has them."""
    rng, graph = seeded(), canonical(zoo.exported(family))
    profile, group = profile_of(graph, seed=int(rng.integers(1 << 30))), group_of(graph, rng)
    ffns = find_anatomy(graph).ffns
    weights = {ffn.layer: FFNWeights(ffn) for ffn in ffns}
    assert all(w.down.size and w.ups and w.up_biases and w.down_bias.size for w in weights.values())  # read in time
    found = {ffn.layer: fit(sample_ffn(ffn, profile), group, 0.5, "need") for ffn in ffns}
    dense = {ffn.layer: (ffn.x, ffn.gated, ACTIVATIONS[ffn.activation.name]) for ffn in ffns}
    fitted(graph, profile, group=group)
    tensors = graph.tensors()
    made = [
        tensors.get(f"ffn-route/layer.{layer}/shift") or tensors[f"ffn-route/layer.{layer}/down.y"] for layer in dense
    ]
    graph.outputs = [t for (x, *_), y in zip(dense.values(), made, strict=True) for t in (x, y)]
    save_graph(graph, tmp_path / "model.onnx")
    compared = spared = 0
    for dial in (0.3, 0.5, 0.8):
        outputs = run(tmp_path / "model.onnx", zoo.feeds(family, 4, 11, rng), dial)
        for (layer, (_, gated, act)), x, y in zip(dense.items(), outputs[::2], outputs[1::2], strict=True):
            x, y = x.reshape(-1, x.shape[-1]).astype(np.float64), y.reshape(-1, y.shape[-1])
            router, order, w = found[layer].router, found[layer].order, weights[layer]
            assert sorted(order) == list(range(len(order)))
            scores = 1 / (1 + np.exp(-(x @ router.weight.T.astype(np.float64) + router.bias)))
            ranked = np.sort(scores, 1)
            clear = np.minimum(np.abs(scores - dial).min(1), ranked[:, -1] - ranked[:, -2]) > CLEAR
            chosen = (scores >= dial) | (np.arange(scores.shape[1]) == scores.argmax(1)[:, None])
            mask = np.zeros((len(x), len(order)))
            mask[:, order] = np.repeat(chosen, group, 1)
            pre = [x @ up + (0 if b is None else b) for up, b in zip(w.ups, w.up_biases, strict=True)]
            wanted = (act(pre[0]) * (pre[1] if gated else 1) * mask) @ w.down + w.down_bias
            assert np.abs(y - wanted)[clear].max(initial=0) <= 1e-5 * max(1, np.abs(wanted).max())
            compared, spared = compared + int(clear.sum()), spared + int((mask[clear] == 0).sum())
    assert compared > 100 and spared > 100


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_new_states_meet_the_sparsity_with_less_error_than_chance(family: str) -> None:
    """The share is met on states that no fit saw, in few directions as those of models are."""
    rng, graph = seeded(), canonical(zoo.exported(family))
    sparsity, group = float(rng.choice([0.4, 0.6])), 4
    for ffn in find_anatomy(graph).ffns[:1]:
        profile = profile_of(graph, states=4000)
        mixing = rng.standard_normal((ffn.d_model, ffn.d_model)) * 3 / np.arange(1, ffn.d_model + 1)
        states = profile.tensors[f"ffn.{ffn.layer}.states"] @ mixing.astype(np.float32)
        profile.tensors[f"ffn.{ffn.layer}.states"] = states
        layer = sample_ffn(ffn, profile)
        found = fit(layer, group, sparsity, "need")
        assert found.sparsity == pytest.approx(sparsity, abs=0.04)
        groups = ffn.d_ff // group
        by_chance = rng.random((len(layer.held_out), groups)) < 1 - found.sparsity
        y = (layer.h_held_out * np.repeat(by_chance, group, 1)) @ layer.down
        assert found.error < 0.6 * layer.error(y)
        result = fitted(graph, profile, group=group, sparsity=sparsity, layers=(ffn.layer,))
        (row,) = result.details["layers"]
        assert (row["sparsity"], row["error"]) == (round(found.sparsity, 4), round(found.error, 4))
        assert row["density"] == pytest.approx(1 - sparsity, abs=0.04) and row["groups"] == groups


def test_contributions_are_what_groups_add() -> None:
    rng = seeded()
    h, down = rng.standard_normal((300, 24)), rng.standard_normal((24, 10))
    wanted = [[np.square(part @ down[4 * g : 4 * g + 4]).sum() for g, part in enumerate(np.split(t, 6))] for t in h]
    found = contributions(h.astype(np.float32), down.astype(np.float32), 4)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("states", [2, 3, 11])
def test_few_states_are_enough_for_some_router(states: int) -> None:
    graph = canonical(zoo.exported("bert"))
    result = fitted(graph, profile_of(graph, states=states), group=8)
    assert result.changed == 3 and all(np.isfinite(row["error"]) for row in result.details["layers"])


def test_a_rest_stands_for_the_groups_that_are_left_out() -> None:
    """Fitted in the order of the groups: it never makes the error larger."""
    graph = canonical(zoo.exported("gpt2"))
    rows = fitted(graph, profile_of(graph, states=1000), group=8, rest={"rank": 8}).details["layers"]
    assert all(row["rest_rank"] == 8 and row["error"] < row["error_without_rest"] for row in rows)


def test_what_cannot_be_done_is_refused() -> None:
    graph = canonical(zoo.exported("bert"))
    profile = profile_of(graph)
    for options, says in (
        ({}, r"groups of 32 do not divide the 80 neurons of layer 0 FFN; use groups of 16, 20, 40"),
        ({"group": 40, "sparsity": 0.7}, r"sparsity: layer 0 FFN can leave out 50\.0% .*one of its 2 groups at least"),
    ):
        with pytest.raises(PassError, match=says):
            fitted(canonical(zoo.exported("bert")), profile, **options)
    with pytest.raises(PassError, match="the profile has no statistics") as error:
        fitted(canonical(zoo.exported("bert")), Profile(profile.info), group=8)
    assert "calibrate" in str(error.value.hint)
    with pytest.raises(ValidationError, match="trained routers have their own; it goes with `router: fitted`"):
        FFNRoute(sparsity=0.5)


def test_what_it_needs_is_states_and_no_training() -> None:
    step = FFNRoute(router="fitted")
    assert step.needed() == {FFNStates()}
    assert FFNRoute().needed() == {Learned("lte")}
    step.check_profile(None, [])
