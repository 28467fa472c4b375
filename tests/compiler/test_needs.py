"""What passes need of the Profile is declared by them, measured for them, and checked before anything long runs."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
import zoo
from seeds import seeded

from trimtab.compiler import compile_model, pipeline, profile_cache
from trimtab.compiler.calibrate import calibrate
from trimtab.compiler.data import Dataset, read_data
from trimtab.compiler.recipe import Calibration, Recipe
from trimtab.compiler.sources import open_source
from trimtab.passes import Pass, PassContext, PassResult
from trimtab.passes.errors import ModelError, NotLearnedError, ProfileError
from trimtab.passes.needs import DEFAULT, AttentionReceived, FFNStates, HeadStates, Learned, Need, to_measure
from trimtab.passes.profile import Profile, ProfileInfo, Received


class Watch(Pass):
    """Changes nothing, and keeps what it was told."""

    name: ClassVar[str] = "watch"
    summary: ClassVar[str] = "for tests"
    needs: ClassVar[frozenset[Need]] = frozenset({AttentionReceived()})
    seen: ClassVar[list[Profile | None]] = []

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        self.seen.append(context.profile)
        return PassResult(self.name, 0)


def data(family: str, folder: Path, samples: int = 9, tokens: int = 11) -> tuple[Dataset, dict[str, np.ndarray]]:
    feeds = zoo.feeds(family, samples, tokens, seeded())
    np.savez(folder / "data.npz", **feeds)
    return read_data(folder / "data.npz"), feeds


def received(family: str, feeds: dict[str, np.ndarray]) -> list[Received]:
    """Of all tokens, layer by layer, as the torch model attends."""
    model = zoo.tiny_model(family)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        layers = model(**{k: torch.from_numpy(v) for k, v in feeds.items()}, output_attentions=True).attentions
    mask = feeds.get("attention_mask", np.ones((len(layers[0]), layers[0].shape[-1]), np.int64))
    found = []
    for weights in layers:
        values, lengths, positions = [], [], []
        for one, real in zip(weights.numpy().astype(np.float64), mask == 1, strict=True):
            values += list(one[:, real][..., real].mean((0, 1)))
            lengths += [real.sum()] * real.sum()
            positions += list(range(real.sum()))
        found.append(Received(np.array(values), np.array(lengths), np.array(positions)))
    return found


def in_order(sample: Received) -> np.ndarray:
    """The values, in an order that does not depend on that of the samples."""
    return sample.values[np.lexsort((sample.values, sample.positions, sample.lengths))]


@pytest.mark.parametrize(
    ("family", "exporter"), [("bert", "dynamo"), ("vit", "dynamo"), ("t5", "dynamo"), ("opt", "torchscript")]
)
def test_attention_received_is_the_models_own(family: str, exporter: str, tmp_path: Path) -> None:
    dataset, feeds = data(family, tmp_path)
    source = open_source(str(zoo.exported(family, exporter)))
    profile = calibrate(source, dataset, needs={AttentionReceived()}, batch_size=4)
    assert all(name.startswith("attention.") for name in profile.tensors)
    for layer, want in enumerate(received(family, feeds)):
        got = profile.received(layer)
        np.testing.assert_array_equal(np.sort(got.lengths), np.sort(want.lengths))
        np.testing.assert_allclose(in_order(got), in_order(want), atol=1e-5)
        texts = (1 / got.lengths).sum()
        np.testing.assert_allclose(got.values.sum(), texts, atol=1e-4)  # 1 for each text


def test_the_sample_is_bounded_and_of_the_same_tokens_in_every_layer(tmp_path: Path) -> None:
    dataset, _ = data("bert", tmp_path)
    source = open_source(str(zoo.exported("bert")))
    profiles = [
        calibrate(source, dataset, needs={AttentionReceived()}, states=12, batch_size=size, seed=3) for size in (2, 9)
    ]
    for layer in range(3):
        a, b = (profile.received(layer) for profile in profiles)
        assert len(a.values) == 12
        np.testing.assert_allclose(a.values, b.values, atol=1e-6)
        first = profiles[0].received(0)
        np.testing.assert_array_equal((a.lengths, a.positions), (first.lengths, first.positions))


def test_what_is_asked_for_is_measured(tmp_path: Path) -> None:
    dataset, _ = data("gpt2", tmp_path)
    source = open_source(str(zoo.exported("gpt2")))
    kinds = {
        need: {name.partition(".")[0] for name in calibrate(source, dataset, needs=need).tensors}
        for need in (DEFAULT, frozenset({AttentionReceived()}), DEFAULT | {AttentionReceived()})
    }
    assert list(kinds.values()) == [{"ffn", "head"}, {"attention"}, {"ffn", "head", "attention"}]
    assert to_measure({FFNStates()}) == to_measure({HeadStates()}) == DEFAULT  # one Profile serves the passes there are
    assert to_measure({AttentionReceived(), Learned("lte")}) == {AttentionReceived()}


def test_attention_inside_of_an_op_is_named(tmp_path: Path) -> None:
    dataset, _ = data("gpt2", tmp_path)
    source = open_source(str(zoo.exported("gpt2", "cached")))
    with pytest.raises(ModelError, match="GroupQueryAttention computes it inside") as error:
        calibrate(source, dataset, needs={AttentionReceived()})
    assert "eager" in (error.value.hint or "")


def test_a_compile_measures_what_its_passes_need(tmp_path: Path) -> None:
    data("bert", tmp_path)
    Watch.seen.clear()
    model = str(zoo.exported("bert"))
    recipe = Recipe(passes=(Watch(),), check=False, calibration=Calibration(samples=8))
    compile_model(model, recipe, tmp_path / "build", data=tmp_path / "data.npz")
    (profile,) = Watch.seen
    assert profile is not None
    assert len(profile.received(2).values) > 0
    assert not any(name.startswith("ffn.") for name in profile.tensors)


def test_a_profile_in_the_cache_is_of_the_same_needs(tmp_path: Path) -> None:
    dataset, _ = data("bert", tmp_path)
    source, options = open_source(str(zoo.exported("bert"))), Calibration(samples=8)
    without = profile_cache.measured_profile(source, dataset, options)
    with_it = profile_cache.measured_profile(source, dataset, options, needs=DEFAULT | {AttentionReceived()})
    assert with_it.tensors.keys() > without.tensors.keys()


def test_a_given_profile_that_lacks_something_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model was opened")

    monkeypatch.setattr(pipeline, "open_source", never)
    profile = Profile(ProfileInfo(model="m", data="d", samples=1, tokens=1))
    with pytest.raises(ProfileError, match="pass watch: the profile has no attention that tokens receive"):
        compile_model("model.onnx", Recipe(passes=(Watch(),)), tmp_path / "build", profile=profile)
    with pytest.raises(ProfileError, match="layer 1 attention"):
        profile.received(1)


def test_learned_weights_are_a_need_like_others() -> None:
    profile = Profile(ProfileInfo(model="m", data="d", samples=1, tokens=1))
    for given, words in ((None, "there is no profile, and so no"), (profile, "the profile holds no")):
        with pytest.raises(NotLearnedError, match=f"{words} weights learned by lte"):
            Learned("lte").check(given)
    profile.tensors["learned.lte.router"] = np.zeros(1)
    Learned("lte").check(profile)
