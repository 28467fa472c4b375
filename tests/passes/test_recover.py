"""The pass `recover`: puts learned weights in, all or none, and only where they were learned."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from seeds import seeded

from trimtab.passes.contract import Capability, Pass, PassContext, PassResult, Rounding, run_passes
from trimtab.passes.errors import PassError, ProfileError
from trimtab.passes.graph import constant, values
from trimtab.passes.profile import Profile, ProfileInfo
from trimtab.passes.recover import Recover, origin_of


def two_layers(rng: np.random.Generator, dtype: type = np.float32) -> gs.Graph:
    body = "g (float[N,4] x) => (float[N,4] y) { h = MatMul(x, a) y = MatMul(h, b) }"
    text = f'<ir_version: 10, opset_import: ["" : 23]> {body}'
    graph = gs.import_onnx(onnx.parser.parse_model(text))
    made = {name: constant(name, rng.standard_normal((4, 4)).astype(dtype)) for name in "ab"}
    for node in graph.nodes:
        node.inputs = [made.get(tensor.name, tensor) for tensor in node.inputs]
    return graph


def weights(graph: gs.Graph) -> dict[str, np.ndarray]:
    return {name: np.array(values(t)) for name, t in graph.tensors().items() if isinstance(t, gs.Constant)}


def profile_of(graph: gs.Graph, learned: dict[str, np.ndarray]) -> Profile:
    record = {"from": origin_of(graph, list(learned), []), "steps": 12, "before": {"loss": 2.0}, "after": {"loss": 1.0}}
    info = ProfileInfo(model="m", data="d", samples=1, tokens=1, learned={"recover": record})
    return Profile(info, {f"learned.recover.{name}": value for name, value in learned.items()})


def test_replaces_what_was_learned_and_nothing_else() -> None:
    rng = seeded()
    graph = two_layers(rng)
    before, new = weights(graph), rng.standard_normal((4, 4)).astype(np.float32)
    result = Recover().run(graph, PassContext(profile_of(graph, {"b": new})))
    after = weights(graph)
    np.testing.assert_array_equal(after["a"], before["a"])
    np.testing.assert_array_equal(after["b"], new)
    assert (result.changed, result.details["steps"]) == (1, 12)


def test_unchanged_weights_are_the_exact_end() -> None:
    graph = two_layers(seeded(), np.float16)
    before = weights(graph)
    Recover().run(graph, PassContext(profile_of(graph, before)))
    for name, value in weights(graph).items():
        assert value.dtype == np.float16
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("change", ["values", "shape", "gone", "type"])
def test_another_graph_is_refused_whole(change: str) -> None:
    rng = seeded()
    graph = two_layers(rng)
    profile = profile_of(graph, {name: value + 1 for name, value in weights(graph).items()})
    b = graph.tensors()["b"]
    if change == "values":
        b.values = values(b) * 1.02
    elif change == "shape":
        b.values = np.zeros((4, 5), np.float32)
    elif change == "type":
        b.values = values(b).astype(np.float64)
    else:
        b.name = "c"
    before = weights(graph)
    with pytest.raises(ProfileError, match=r"initializer .b.,? (is not the one|which is not in this graph)") as caught:
        Recover().run(graph, PassContext(profile))
    assert "trimtab train" in (caught.value.hint or "")
    for name, value in weights(graph).items():
        np.testing.assert_array_equal(value, before[name])


def test_no_profile_and_nothing_learned_are_refused() -> None:
    graph = two_layers(seeded())
    for context in (PassContext(), PassContext(profile_of(graph, {}))):
        with pytest.raises(ProfileError, match="no weights learned by recover"):
            Recover().run(graph, context)


def test_profile_without_its_record_is_refused() -> None:
    graph = two_layers(seeded())
    profile = profile_of(graph, weights(graph))
    bare = Profile(profile.info.model_copy(update={"learned": {}}), profile.tensors)
    with pytest.raises(ProfileError, match="does not say for what graph"):
        Recover().run(graph, PassContext(bare))


def test_initializers_that_differ_by_rounding_are_the_same() -> None:
    graph = two_layers(seeded())
    profile = profile_of(graph, weights(graph))
    for tensor in (graph.tensors()[name] for name in "ab"):
        tensor.values = -values(tensor) * np.float32(1 + 1e-4)  # as singular vectors may turn
    assert Recover().run(graph, PassContext(profile)).changed == len(profile.learned("recover"))


class Before(Pass):
    name: ClassVar[str] = "before"
    summary: ClassVar[str] = "For tests."
    size: int = 1

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        return PassResult(self.name, 0)


def test_other_passes_or_options_before_are_refused() -> None:
    graph = two_layers(seeded())
    context = PassContext(profile_of(graph, weights(graph)))
    run_passes(graph, [Recover()], context)
    with pytest.raises(PassError, match="passes before recover are before, but it learned behind none"):
        run_passes(graph, [Before(), Recover()], context)
    context.profile.info.learned["recover"]["from"] = origin_of(graph, "ab", [Before(size=2)])
    run_passes(graph, [Before(size=2), Recover()], context)
    with pytest.raises(PassError, match="before runs with size = 3, but recover learned with 2"):
        run_passes(graph, [Before(size=3), Recover()], context)


class Rounds(Pass):
    """Stands for a quantizing pass."""

    name: ClassVar[str] = "rounds"
    summary: ClassVar[str] = "for this test"
    largest: int = 7

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        return PassResult(self.name, 0)

    def rounding(self, capability: Capability) -> Rounding:
        return Rounding(self.largest, per_channel=True)


@pytest.mark.parametrize("learned", [None, 7, 127])
@pytest.mark.parametrize("coming", [None, 7])
def test_says_when_the_precision_is_not_that_of_training(
    learned: int | None, coming: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    graph = two_layers(seeded())
    profile = profile_of(graph, weights(graph))
    if learned is not None:
        profile.info.learned["recover"]["rounding"] = {"largest": learned, "per_channel": True}
    run_passes(graph, [Recover()] + ([Rounds(largest=coming)] if coming else []), PassContext(profile))
    assert bool(caplog.records) == (learned != coming)
    assert all("trimtab train" in record.getMessage() for record in caplog.records)
