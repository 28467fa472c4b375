"""Glu: kernel, reference body and ONNX's evaluator agree with float64."""

from __future__ import annotations

import numpy as np
import pytest
from dialects import ACTIVATIONS, close, everywhere, finish, graph_of, native
from seeds import seeded

from trimtab.plugins import GLU, add_node


@pytest.mark.parametrize("gate", [0, 1])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_multiplies_up_with_the_activation_of_the_gate(activation: str, gate: int) -> None:
    rng = seeded()
    for rows, neurons in ((1, 1), (3, 17), (int(rng.integers(2, 200)), int(rng.integers(100, 1500)))):
        graph = graph_of(x=(np.float32, ["batch", "tokens", 2 * neurons]))
        model = finish(graph, add_node(graph, GLU, {"x": graph.inputs[0]}, "y", activation=activation, gate=gate))
        x = 2 * rng.standard_normal((1, rows, 2 * neurons)).astype(np.float32)
        halves = np.split(x.astype(np.float64), 2, -1)
        wanted = ACTIVATIONS[activation](halves[gate]) * halves[1 - gate]
        for (y,) in everywhere(model, {"x": x}).values():
            close(y, wanted)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (1, 1, 0)])
def test_nothing(shape: tuple[int, ...]) -> None:
    graph = graph_of(x=(np.float32, ["batch", "tokens", "both"]))
    model = finish(graph, add_node(graph, GLU, {"x": graph.inputs[0]}, "y", activation="silu"))
    (y,) = native(model).run(None, {"x": np.zeros(shape, np.float32)})
    assert y.shape == (*shape[:-1], shape[-1] // 2)


@pytest.mark.parametrize("what", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_with_its_neuron(what: float) -> None:
    graph = graph_of(x=(np.float32, ["tokens", 64]))
    model = finish(graph, add_node(graph, GLU, {"x": graph.inputs[0]}, "y", activation="silu"))
    x = np.ones((2, 64), np.float32)
    x[0, 3] = what
    for name, (y,) in everywhere(model, {"x": x}).items():
        others = np.delete(y, 3, 1)
        assert np.isfinite(others).all(), name
        assert np.isfinite(y[1]).all(), name
        assert not what > 0 or y[0, 3] == np.inf, name
        assert not np.isnan(what) or np.isnan(y[0, 3]), name


def test_an_odd_size_is_refused() -> None:
    graph = graph_of(x=(np.float32, ["tokens", "both"]))
    model = finish(graph, add_node(graph, GLU, {"x": graph.inputs[0]}, "y", activation="silu"))
    with pytest.raises(Exception, match="2 neurons"):
        native(model).run(None, {"x": np.ones((2, 7), np.float32)})
