"""The pass `recover`: puts learned weights in, all or none, and only where they were learned."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from trimtab.passes.contract import PassContext
from trimtab.passes.errors import ProfileError
from trimtab.passes.graph import constant, fingerprint, values
from trimtab.passes.profile import Profile, ProfileInfo
from trimtab.passes.recover import Recover


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
    origin = {name: fingerprint(t) for name, t in graph.tensors().items() if isinstance(t, gs.Constant)}
    record = {"from": origin, "steps": 12, "before": {"loss": 2.0}, "after": {"loss": 1.0}}
    info = ProfileInfo(model="m", data="d", samples=1, tokens=1, learned={"recover": record})
    return Profile(info, {f"learned.recover.{name}": value for name, value in learned.items()})


def test_replaces_what_was_learned_and_nothing_else() -> None:
    rng = np.random.default_rng()
    graph = two_layers(rng)
    before, new = weights(graph), rng.standard_normal((4, 4)).astype(np.float32)
    result = Recover().run(graph, PassContext(profile_of(graph, {"b": new})))
    after = weights(graph)
    np.testing.assert_array_equal(after["a"], before["a"])
    np.testing.assert_array_equal(after["b"], new)
    assert (result.changed, result.details["steps"]) == (1, 12)


def test_unchanged_weights_are_the_exact_end() -> None:
    graph = two_layers(np.random.default_rng(), np.float16)
    before = weights(graph)
    Recover().run(graph, PassContext(profile_of(graph, before)))
    for name, value in weights(graph).items():
        assert value.dtype == np.float16
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("change", ["values", "shape", "gone", "type"])
def test_another_graph_is_refused_whole(change: str) -> None:
    rng = np.random.default_rng()
    graph = two_layers(rng)
    profile = profile_of(graph, {name: value + 1 for name, value in weights(graph).items()})
    b = graph.tensors()["b"]
    if change == "values":
        b.values = values(b) * 1.01
    elif change == "shape":
        b.values = np.zeros((4, 5), np.float32)
    elif change == "type":
        b.values = values(b).astype(np.float64)
    else:
        b.name = "c"
    before = weights(graph)
    with pytest.raises(ProfileError, match="initializer 'b' (changed since training|is not in this graph)") as caught:
        Recover().run(graph, PassContext(profile))
    assert "trimtab train" in (caught.value.hint or "")
    for name, value in weights(graph).items():
        np.testing.assert_array_equal(value, before[name])


def test_no_profile_and_nothing_learned_are_refused() -> None:
    graph = two_layers(np.random.default_rng())
    for context in (PassContext(), PassContext(profile_of(graph, {}))):
        with pytest.raises(ProfileError, match="no weights learned by recover"):
            Recover().run(graph, context)


def test_profile_without_its_record_is_refused() -> None:
    graph = two_layers(np.random.default_rng())
    profile = profile_of(graph, weights(graph))
    bare = Profile(profile.info.model_copy(update={"learned": {}}), profile.tensors)
    with pytest.raises(ProfileError, match="changed since training"):
        Recover().run(graph, PassContext(bare))
