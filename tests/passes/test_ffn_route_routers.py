"""Routers of ffn-route: in int8 beside integer rows, as int4 copies of the weights, damaged, and of another model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import zoo
from dialects import ACTIVATIONS
from rewrite import canonical
from routes import CLEAR, ffn_of, groups_of, profile_with, random_routers, routed, run, watch
from seeds import seeded

from trimtab.passes import Capability, PassContext, run_passes
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.errors import NotLearnedError, PassError, ProfileError
from trimtab.passes.ffn_route.route import FFNRoute
from trimtab.passes.ffn_route.routers import Routers
from trimtab.passes.graph import save_graph
from trimtab.passes.sampled_ffn import FFNWeights


def _int4(w: np.ndarray) -> np.ndarray:
    """[d_model, d_ff] to the nearest of the levels -8 .. 7, whose steps are those of 64, 32 or 16 inputs; float64.

    Steps are numbers of bfloat16.
    """
    blocks = w.astype(np.float32).reshape(-1, next(n for n in (64, 32, 16) if len(w) % n == 0), w.shape[1])
    step = np.maximum(np.abs(blocks).max(1, keepdims=True), np.float32(1e-12)) / np.float32(7) * np.float32(0.9)
    step, blocks = step.astype(ml_dtypes.bfloat16).astype(np.float64), blocks.astype(np.float64)
    return np.asarray((np.clip(np.rint(blocks / step), -8, 7) * step).reshape(w.shape))


@pytest.mark.parametrize(
    ("family", "weights"), [("bert", "int8"), ("opt", "int8"), ("llama", "int8"), ("llama", "int4")]
)
def test_large_routers_are_int8_beside_integer_rows(
    family: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They choose by weights that are rounded in blocks; ONNX Runtime rounds x, too, which moves scores a little."""
    rng, graph = seeded(), canonical(zoo.exported(family))
    learned, ffns = random_routers(graph, rng), find_anatomy(graph).ffns
    monkeypatch.setattr("trimtab.passes.ffn_route.router._LARGE", 1)
    (result,) = routed(graph, learned, weights=weights)
    routers = Routers.of(learned).in_integers().by_layer
    for ffn, row in zip(ffns, result.details["layers"], strict=True):
        assert row["router_bytes"] == routers[ffn.layer].nbytes < learned[f"router.{ffn.layer}.weight"].nbytes / 2
    assert graph.opset >= 21
    read = {ffn.layer: graph.tensors()[ffn.x.name] for ffn in ffns}
    scores = {layer: graph.tensors()[f"ffn-route/layer.{layer}/router/scores"] for layer in read}
    graph.outputs = [t for layer in read for t in (read[layer], scores[layer])]
    save_graph(graph, tmp_path / "model.onnx")
    for batch, tokens in ((1, 1), (3, 7), (16, 40)):
        found = run(tmp_path / "model.onnx", zoo.feeds(family, batch, tokens, rng), 0.5)
        for layer, x, got in zip(read, found[::2], found[1::2], strict=True):
            x, got = x.reshape(-1, x.shape[-1]).astype(np.float64), got.reshape(-1, got.shape[-1])
            weight, bias = learned[f"router.{layer}.weight"].astype(np.float64), learned[f"router.{layer}.bias"]
            off = got - 1 / (1 + np.exp(-(x @ weight.T + bias)))
            lengths = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(weight, axis=1)
            assert (np.abs(off) <= 0.01 * lengths / 4 + 1e-5).all()  # a sigmoid is nowhere steeper than 1 / 4
            off = got - routers[layer].scores(x)
            assert (np.abs(off) <= 0.01 * lengths / 4 + 1e-5).all()


@pytest.mark.parametrize(
    ("options", "capability", "large"),
    [({}, Capability(), 1), ({"weights": "int8"}, Capability(weight_bits=frozenset({4})), 1),
     ({"weights": "int8"}, Capability(), 1 << 20)],
)  # fmt: skip
def test_other_routers_stay_in_floating_point(
    options: dict[str, Any], capability: Capability, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside rows in floating point, on a target without such products, and where they are small."""
    rng, graph = seeded(), canonical(zoo.exported("bert"))
    learned = random_routers(graph, rng)
    monkeypatch.setattr("trimtab.passes.ffn_route.router._LARGE", large)
    (result,) = run_passes(graph, [FFNRoute.model_validate(options)], PassContext(profile_with(learned), capability))
    for row in result.details["layers"]:
        name = f"router.{row['layer']}"
        assert row["router_bytes"] == learned[f"{name}.weight"].nbytes + learned[f"{name}.bias"].nbytes


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("family", ["bert", "opt", "llama"])
def test_copies_choose_by_what_neurons_add(family: str, single: bool, tmp_path: Path) -> None:
    """Every FFN computes the groups whose neurons add enough by int4 copies of the weights in front of them."""
    rng, graph = seeded(), canonical(zoo.exported(family))
    ffns = find_anatomy(graph).ffns
    learned: dict[str, np.ndarray] = {"threshold": np.array([0.5], np.float32)}
    for ffn in ffns:
        size = 1 if single else ffn.d_ff // groups_of(ffn.d_ff, rng)
        learned[f"router.{ffn.layer}.sizes"] = (rng.lognormal(1, 1, (ffn.d_ff // size, size)) / size).astype(np.float32)
    dense = {ffn.layer: (ffn.x, FFNWeights(ffn), ffn.activation.name, ffn.gated) for ffn in ffns}
    (result,) = run_passes(graph, [FFNRoute()], PassContext(profile_with(learned)))
    assert result.changed == len(ffns)
    for ffn, row in zip(ffns, result.details["layers"], strict=True):
        copies = (1 + ffn.gated) * ffn.d_model * ffn.d_ff * 0.5
        assert copies < row["router_bytes"] < 1.6 * copies + 4 * ffn.d_ff
    watch(graph, {layer: x for layer, (x, *_) in dense.items()}, tmp_path / "model.onnx")
    compared, shares = 0, []
    for batch, tokens in ((1, 1), (3, 7), (16, 40)):
        dial = np.append(0.5, rng.choice([0.0, 0.3, 0.5, 0.7, 1.0], batch - 1))
        found = run(tmp_path / "model.onnx", zoo.feeds(family, batch, tokens, rng), dial)
        for (layer, (_, w, activation, gated)), x, y in zip(dense.items(), found[::2], found[1::2], strict=True):
            x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
            pre = [
                x.astype(np.float64) @ _int4(up) + (0 if b is None else b)
                for up, b in zip(w.ups, w.up_biases, strict=True)
            ]
            h = ACTIVATIONS[activation](pre[0]) * (pre[1] if gated else 1)
            sizes = learned[f"router.{layer}.sizes"].astype(np.float64)
            added = (np.abs(h).reshape(len(x), *sizes.shape) * sizes).sum(-1)
            scores, level = added / (1 + added), np.repeat(dial, tokens)[:, None]
            best = np.arange(scores.shape[1]) == scores.argmax(1, keepdims=True) if len(x) else scores > 0
            groups, ranked = (scores >= level) | best, np.sort(scores, 1)
            clear = np.where(level[:, 0] > 0, np.abs(scores - level).min(1, initial=1), 1)
            sure = np.minimum(clear, ranked[:, -1] - ranked[:, -2]) > CLEAR / 10
            wanted = ffn_of(x, w, activation, gated, groups, False)
            assert np.abs(y - wanted)[sure].max(initial=0) <= 1e-5 * max(1, np.abs(wanted).max(initial=0))
            compared += int(sure.sum())
            shares += list(groups[level[:, 0] == 0.5].mean(1))
    assert compared > 100 and 0.05 < np.mean(shares) < 0.95


def _router(layer: int, groups: int, width: int) -> dict[str, np.ndarray]:
    weight, bias = np.zeros((groups, width), np.float32), np.zeros(groups, np.float32)
    return {f"router.{layer}.weight": weight, f"router.{layer}.bias": bias}


def _sizes(sizes: np.ndarray) -> dict[str, Any]:
    """A router of copies in the place of the linear one."""
    return {"router.0.weight": None, "router.0.bias": None, "router.0.sizes": sizes.astype(np.float32)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_router(0, 4, 9), "reads 9 features"),
        (_router(7, 4, 48), "router of FFN 7"),
        (_router(0, 7, 48), "do not divide its 80"),
        ({"router.0.bias": None}, "router of FFN 0 in the profile is damaged"),
        (_sizes(np.ones((8, 9))), "knows 72 neurons, and the FFN has 80"),
        (_sizes(-np.ones((8, 10))), "router of FFN 0 in the profile is damaged"),
        ({"router.0.sizes": np.ones((8, 10), np.float32)}, "router of FFN 0 in the profile is damaged"),
        ({"router.0.bias": np.full(8, np.nan, np.float32)}, "router of FFN 0 in the profile is damaged"),
        ({"router.0.weight": np.ones((0, 48), np.float32)}, "router of FFN 0 in the profile is damaged"),
        ({"threshold": np.array([np.nan], np.float32)}, "threshold of the routers in the profile is damaged"),
        ({"threshold": np.array([1.7], np.float32)}, "threshold of the routers in the profile is damaged"),
        ({"threshold": np.zeros(0, np.float32)}, "threshold of the routers in the profile is damaged"),
        (_sizes(np.full((8, 10), np.nan)), "router of FFN 0 in the profile is damaged"),
        ({"cumulative": np.array([0.9], np.float32)}, "not one of threshold and cumulative"),
        ({"threshold": None}, "not one of threshold and cumulative"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_routers_of_another_model(change: dict[str, Any], says: str) -> None:
    graph = canonical(zoo.exported("bert"))
    learned = random_routers(graph, np.random.default_rng(0)) | change
    learned = {name: value for name, value in learned.items() if value is not None}
    with pytest.raises(PassError, match=says):
        routed(graph, learned)


def test_without_routers() -> None:
    for profile in (None, profile_with({}), profile_with({"threshold": np.array([0.5], np.float32)})):
        with pytest.raises(NotLearnedError, match=r"no weights learned by lte|no routers") as error:
            FFNRoute().check_profile(profile, [])
        assert "--method lte" in str(error.value.hint)
    with pytest.raises(ProfileError, match="damaged"):
        FFNRoute().check_profile(profile_with({"router.0.weight": np.zeros((4, 8), np.float32)}), [])


def test_what_cannot_be_copied_stays_dense() -> None:
    for family, capability, says in (
        ("gpt2", Capability(), "reads 40 features, which no block of int4 weights divides"),
        ("llama", Capability(weight_bits=frozenset({8})), "does not multiply with int4"),
    ):
        graph = canonical(zoo.exported(family))
        sizes = {f"router.{ffn.layer}.sizes": np.ones((ffn.d_ff, 1), np.float32) for ffn in find_anatomy(graph).ffns}
        profile = profile_with({"threshold": np.array([0.5], np.float32)} | sizes)
        (result,) = run_passes(graph, [FFNRoute()], PassContext(profile, capability))
        assert not result.changed and len(result.left) == len(sizes) and says in result.left[0].why


def test_copies_raise_the_opset(tmp_path: Path) -> None:
    """To that of blockwise int4, whatever the exporter wrote."""
    graph = canonical(zoo.exported("llama", "torchscript"))
    assert graph.opset < 21
    sizes = {f"router.{ffn.layer}.sizes": np.ones((ffn.d_ff, 1), np.float32) for ffn in find_anatomy(graph).ffns}
    (result,) = routed(graph, {"threshold": np.array([0.5], np.float32)} | sizes)
    assert result.changed == len(sizes)
    save_graph(graph, tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    run(tmp_path / "model.onnx", zoo.feeds("llama", 2, 5, seeded()), 0.5)
