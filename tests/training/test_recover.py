"""Recovery: it learns, it can be repeated, it ends in time, and what it learned fits the compiled graph alone."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import zoo
from recovery import ZeroNeurons, arrays_of, empty_profile, onnx_source, recipe
from seeds import seeded

from trimtab.compiler.data import Dataset, read_data
from trimtab.compiler.recipe import Recipe
from trimtab.compiler.sources import Source
from trimtab.passes import PassContext, run_passes
from trimtab.passes.contract import Capability, Pass, PassResult, Rounding
from trimtab.passes.errors import DataError, ModelError, PassError, ProfileError, RecipeError, TrimtabError
from trimtab.passes.graph import save_graph, values
from trimtab.passes.profile import Profile
from trimtab.training.clock import schedule
from trimtab.training.recover.recover import recover
from trimtab.training.recover.settings import Settings

SHORT = Settings(minutes=5, steps=40, lr=2e-3, batch_size=16, max_tokens=16)


@pytest.fixture
def bert() -> Source:
    return onnx_source("bert")


def outputs(graph: gs.Graph, feeds: dict[str, np.ndarray], folder: Path) -> list[np.ndarray]:
    save_graph(graph, folder / "model.onnx")
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return session.run(None, {t.name: feeds[t.name] for t in session.get_inputs()})


def compiled(source: Source, plan: Recipe, profile: Profile) -> gs.Graph:
    graph = source.graph()
    run_passes(graph, plan.passes, PassContext(profile))
    return graph


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama", "vit"])
def test_learned_weights_bring_outputs_nearer_to_the_dense(family: str, tmp_path: Path) -> None:
    source, plan = onnx_source(family), recipe(ZeroNeurons())
    data = arrays_of(family, 120, tmp_path)
    base = empty_profile(source)
    profile = recover(source, plan, data, base, SHORT)
    record = profile.info.learned["recover"]
    assert record["after"]["loss"] < 0.7 * record["before"]["loss"]
    assert record["steps"] == 40
    feeds = zoo.feeds(family, 64, 9, np.random.default_rng(1))
    dense = outputs(source.graph(), feeds, tmp_path)[0]
    zeroed = source.graph()
    run_passes(zeroed, plan.passes[:1], PassContext())
    before = np.square(outputs(zeroed, feeds, tmp_path)[0] - dense).mean()
    after = np.square(outputs(compiled(source, plan, profile), feeds, tmp_path)[0] - dense).mean()
    assert after < 0.8 * before
    assert base.info.learned == {}
    np.testing.assert_array_equal(profile.tensors["head.states"], 7)


def test_pass_puts_in_what_was_learned(bert: Source, tmp_path: Path) -> None:
    plan, data = recipe(ZeroNeurons()), arrays_of("bert", 100, tmp_path)
    profile = recover(bert, plan, data, empty_profile(bert), SHORT)
    graph = compiled(bert, plan, profile)
    tensors = graph.tensors()
    for name, value in profile.learned("recover").items():
        np.testing.assert_array_equal(values(tensors[name]), value)
    assert any(not np.array_equal(values(bert.graph().tensors()[n]), v) for n, v in profile.learned("recover").items())


@pytest.mark.parametrize(("family", "changed"), [("bert", {"states_weight": 0.0}), ("llama", {"temperature": 4.0})])
def test_what_is_minimised_follows_the_settings(family: str, changed: dict[str, float], tmp_path: Path) -> None:
    source, plan, data = onnx_source(family), recipe(ZeroNeurons()), arrays_of(family, 120, tmp_path)
    runs = [
        recover(source, plan, data, empty_profile(source), settings).learned("recover")
        for settings in (SHORT, SHORT.model_copy(update=changed))
    ]
    assert not all(np.allclose(runs[0][name], runs[1][name], rtol=0, atol=1e-6) for name in runs[0])


def labelled(family: str, labels: np.ndarray, folder: Path) -> Dataset:
    path = arrays_of(family, len(labels), folder).path
    with np.load(path) as arrays:
        np.savez(path, **arrays, label=labels)
    return read_data(path)


def test_labels_draw_the_classes_to_themselves(bert: Source, tmp_path: Path) -> None:
    data = labelled("bert", np.full(60, 1), tmp_path)
    feeds = zoo.feeds("bert", 64, 9, seeded())
    plan, shares = recipe(ZeroNeurons()), []
    for weight in (0.0, 20.0):
        profile = recover(bert, plan, data, empty_profile(bert), SHORT.model_copy(update={"labels_weight": weight}))
        logits = outputs(compiled(bert, plan, profile), feeds, tmp_path)[0]
        shares.append((logits.argmax(-1) == 1).mean())
    assert shares[1] == 1 and shares[1] > shares[0]


def test_labels_that_cannot_weigh_are_refused(bert: Source, tmp_path: Path) -> None:
    settings, plan = Settings(steps=1, labels_weight=1.0), recipe(ZeroNeurons())
    for labels, message in (
        (np.full(20, -1), "no sample has a label"),
        (np.full(20, 99), r"label 99 lies outside 0\.\."),
    ):
        with pytest.raises(DataError, match=message):
            recover(bert, plan, labelled("bert", labels, tmp_path), empty_profile(bert), settings)
    llama = onnx_source("llama")
    with pytest.raises(ModelError, match="classifiers and scores alone"):
        recover(llama, plan, labelled("llama", np.ones(20, int), tmp_path), empty_profile(llama), settings)


def test_no_step_is_the_exact_end(bert: Source, tmp_path: Path) -> None:
    plan, data = recipe(ZeroNeurons()), arrays_of("bert", 20, tmp_path)
    for settings in (Settings(steps=0), Settings(minutes=0)):
        profile = recover(bert, plan, data, empty_profile(bert), settings)
        assert profile.info.learned["recover"]["steps"] == 0
        graph, zeroed = compiled(bert, plan, profile), bert.graph()
        run_passes(zeroed, plan.passes[:1], PassContext())
        there = graph.tensors()
        for name, tensor in zeroed.tensors().items():
            if isinstance(tensor, gs.Constant):
                np.testing.assert_array_equal(values(there[name]), values(tensor))


def test_same_seed_same_weights(bert: Source, tmp_path: Path) -> None:
    plan, data = recipe(ZeroNeurons()), arrays_of("bert", 60, tmp_path)
    runs = [
        recover(bert, plan, data, empty_profile(bert), Settings(steps=5, batch_size=8, seed=seed)).learned("recover")
        for seed in (3, 3, 4)
    ]
    same, other = ([np.array_equal(runs[0][name], run[name]) for name in runs[0]] for run in runs[1:])
    assert all(same)
    assert not all(other)


def test_ends_in_time_with_the_schedule_run_down(bert: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()  # each reading of the clock is a second later
    for module in ("recover.recover", "recover.distill", "clock"):
        monkeypatch.setattr(f"trimtab.training.{module}.time", SimpleNamespace(monotonic=ticks.__next__))
    data, seen = arrays_of("bert", 60, tmp_path), []
    profile = recover(
        bert, recipe(ZeroNeurons()), data, empty_profile(bert), Settings(minutes=1, batch_size=8),
        progress=lambda what, done, total: seen.append((what, done, total)),
    )  # fmt: skip
    assert next(ticks) - 1 <= 60
    assert profile.info.learned["recover"]["steps"] == len(seen) > 20
    assert seen[-1] == ("distil", 60, 60)


def test_schedule_rises_and_falls() -> None:
    factors = [schedule(at) for at in np.linspace(0, 1, 101)]
    top = int(np.argmax(factors))
    assert 0 < top < 10
    assert factors[:top] == sorted(factors[:top])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert factors[0] > 0
    assert factors[-1] == pytest.approx(0)


def test_ffn_alone(bert: Source, tmp_path: Path) -> None:
    data = arrays_of("bert", 40, tmp_path)
    settings = Settings(steps=3, train="ffn", batch_size=8)
    profile = recover(bert, recipe(ZeroNeurons()), data, empty_profile(bert), settings)
    assert len(profile.learned("recover")) == 3 * 4  # of each layer: two weights, two biases


def test_passes_behind_recover_are_not_run(bert: Source, tmp_path: Path) -> None:
    class Refuses(Pass):
        name = "refuses"
        summary = "For tests."

        def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
            raise AssertionError("this pass should not have run")

    data = arrays_of("bert", 20, tmp_path)
    plan = recipe(ZeroNeurons(), after=(Refuses(),))
    recover(bert, plan, data, empty_profile(bert), Settings(steps=1, batch_size=4))


def test_learns_with_the_rounding_of_a_pass_behind(bert: Source, tmp_path: Path) -> None:
    class Coarse(Pass):
        name = "coarse"
        summary = "For tests."

        def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
            return PassResult(self.name, 0)

        def rounding(self, capability: Capability) -> Rounding:
            return Rounding(largest=7, per_channel=True)

    data, records = arrays_of("bert", 120, tmp_path), []
    for after in ((), (Coarse(),)):
        profile = recover(bert, recipe(ZeroNeurons(), after=after), data, empty_profile(bert), SHORT)
        records.append(profile.info.learned["recover"])
    plain, rounded = records
    assert abs(rounded["before"]["loss"] / plain["before"]["loss"] - 1) > 1e-4
    assert rounded["after"]["loss"] < 0.9 * rounded["before"]["loss"]
    assert (plain["rounding"], rounded["rounding"]) == (None, {"largest": 7, "per_channel": True, "per_row": False})


def test_learns_from_texts_of_every_length(tmp_path: Path) -> None:
    source = replace(onnx_source("bert"), tokenizer=zoo.save_pretrained("bert", tmp_path / "bert"))
    words = seeded().integers(0, 90, 4000).astype(str)
    lines = [" ".join(words[start : start + 1 + start % 17]) for start in range(0, 3600, 30)]
    (tmp_path / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
    data = read_data(tmp_path / "texts.txt")
    profile = recover(source, recipe(ZeroNeurons()), data, empty_profile(source), SHORT)
    record = profile.info.learned["recover"]
    assert record["after"]["loss"] < record["before"]["loss"]
    assert record["data"] == data.sha256


def test_profile_survives_its_file(bert: Source, tmp_path: Path) -> None:
    plan, data = recipe(ZeroNeurons()), arrays_of("bert", 20, tmp_path)
    profile = recover(bert, plan, data, empty_profile(bert), Settings(steps=2, batch_size=4))
    profile.save(tmp_path / "p.safetensors")
    tensors = compiled(bert, plan, Profile.load(tmp_path / "p.safetensors")).tensors()
    learned = profile.learned("recover")
    assert learned
    for name, value in learned.items():
        np.testing.assert_array_equal(values(tensors[name]), value)


def test_profile_keeps_what_a_budget_chose(bert: Source, tmp_path: Path) -> None:
    class Chooses(Pass):
        name = "chooses"
        summary = "For tests."
        searches: ClassVar[list[int]] = []

        def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
            context.choice(self, lambda: self.searches.append(1) or [1, 2], lambda known: known == [1, 2])
            return PassResult(self.name, 0)

    plan, data = recipe(Chooses()), arrays_of("bert", 20, tmp_path)
    profile = recover(bert, plan, data, empty_profile(bert), Settings(steps=1, batch_size=4))
    profile.save(tmp_path / "p.safetensors")
    compiled(bert, plan, Profile.load(tmp_path / "p.safetensors"))
    assert len(Chooses.searches) == 1


def test_learning_again_replaces_what_was_learned(bert: Source, tmp_path: Path) -> None:
    plan, data = recipe(ZeroNeurons()), arrays_of("bert", 20, tmp_path)
    first = recover(bert, plan, data, empty_profile(bert), Settings(steps=2, batch_size=4))
    again = recover(bert, plan, data, first, Settings(steps=2, batch_size=4, train="ffn"))
    assert len(again.learned("recover")) < len(first.learned("recover"))
    compiled(bert, plan, again)


def test_another_graph_is_refused(bert: Source, tmp_path: Path) -> None:
    data = arrays_of("bert", 20, tmp_path)
    profile = recover(bert, recipe(ZeroNeurons()), data, empty_profile(bert), Settings(steps=1, batch_size=4))
    with pytest.raises(
        PassError, match=r"zero-neurons runs with share = 0\.25, but recover learned with 0\.5"
    ) as caught:
        compiled(bert, recipe(ZeroNeurons(share=0.25)), profile)
    assert "trimtab train" in (caught.value.hint or "")


def test_recipe_without_recover_is_refused(bert: Source, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no pass 'recover'"):
        recover(bert, Recipe(passes=(ZeroNeurons(),)), arrays_of("bert", 9, tmp_path), empty_profile(bert), SHORT)


def test_one_sample_is_refused(bert: Source, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 sample"):
        recover(bert, recipe(), arrays_of("bert", 1, tmp_path), empty_profile(bert), SHORT)


def test_data_of_another_model_is_refused(bert: Source, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="pixel_values"):
        recover(bert, recipe(), arrays_of("vit", 9, tmp_path), empty_profile(bert), SHORT)


def test_unknown_operator_is_refused(bert: Source, tmp_path: Path) -> None:
    class Custom(Pass):
        name = "custom"
        summary = "For tests."

        def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
            node = next(node for node in graph.nodes if node.op == "Softmax")
            node.op, node.domain, node.name = "SparseSoftmax", "trimtab", "custom/layer.0"
            return PassResult(self.name, 1)

    with pytest.raises(ModelError, match=r"custom/layer\.0.*trimtab::SparseSoftmax"):
        recover(bert, recipe(Custom()), arrays_of("bert", 9, tmp_path), empty_profile(bert), SHORT)


def test_divergence_is_an_error(bert: Source, tmp_path: Path) -> None:
    data = arrays_of("bert", 20, tmp_path)
    with pytest.raises(TrimtabError, match=r"loss is (nan|inf) at step .*--lr"):
        recover(bert, recipe(ZeroNeurons()), data, empty_profile(bert), Settings(steps=30, lr=1e30, batch_size=4))


def test_profile_without_learned_weights_is_refused(bert: Source) -> None:
    with pytest.raises(PassError, match="no weights learned by recover") as caught:
        compiled(bert, recipe(), empty_profile(bert))
    assert isinstance(caught.value.__cause__, ProfileError)
