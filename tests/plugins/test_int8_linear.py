"""Int8Linear: integer products with a scale for each row, which no other row changes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from dialects import ACTIVATIONS, everywhere, finish, graph_of, native

from trimtab.plugins import INT8_LINEAR, add_node
from trimtab.plugins.int8_linear import LARGEST, LEVELS, NUMBERS, WIDEST

SEED = int(np.random.default_rng().integers(1 << 30))
Weight = tuple[np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture
def rng() -> np.random.Generator:
    print(f"seed {SEED}")
    return np.random.default_rng(SEED)


def weight_of(rows: int, columns: int, rng: np.random.Generator) -> Weight:
    """Integers [rows, columns], scale and bias [columns]; some are the largest there are."""
    integers = rng.integers(-LARGEST, LARGEST + 1, (rows, columns)).astype(np.int8)
    integers[:, 0] = LARGEST
    scale = (0.1 + rng.random(columns)) / np.sqrt(rows) / LARGEST
    return integers, scale.astype(np.float32), rng.standard_normal(columns).astype(np.float32)


def model_of(weight: Weight, lead: Sequence[int | str], activation: str = "identity") -> onnx.ModelProto:
    graph = graph_of(x=(np.float32, [*lead, len(weight[0])]))
    constants = {name: gs.Constant(name, a) for name, a in zip(("weight", "weight_scale", "bias"), weight, strict=True)}
    y = add_node(graph, INT8_LINEAR, {"x": graph.inputs[0], **constants}, "y", activation=NUMBERS[activation])
    return finish(graph, y)


def rounded(x: np.ndarray) -> np.ndarray:
    """What the integers of `x` [..., width] stand for, in float64; their choice is that of float32."""
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    reach = np.maximum(high - low, np.float32(2**-100))
    inverse = np.float32(LEVELS) / reach
    zero = np.rint(-low * inverse)
    return (np.clip(np.rint(x * inverse) + zero, 0, LEVELS) - zero) * (reach / np.float32(LEVELS)).astype(np.float64)


def reference(x: np.ndarray, weight: Weight, activation: str) -> np.ndarray:
    integers, scale, bias = (part.astype(np.float64) for part in weight)
    return ACTIVATIONS[activation](rounded(x) @ (integers * scale) + bias)


def rows_of(shape: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Rows of sizes that differ by some orders of magnitude, of which some have one sign."""
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3, (*shape[:-1], 1))
    return np.where(rng.random((*shape[:-1], 1)) < 0.2, np.abs(x), x).astype(np.float32)


def close(y: np.ndarray, wanted: np.ndarray, x: np.ndarray, weight: Weight) -> None:
    """Up to float32: integers are summed exactly, and what follows is a handful of operations."""
    assert y.shape == wanted.shape and y.dtype == np.float32
    size = np.abs(x).max(-1, initial=0, keepdims=True) * np.abs(weight[0] * weight[1]).sum(0) + np.abs(weight[2]) + 1
    assert np.all(np.abs(y - wanted) <= 4e-6 * np.maximum(size, np.abs(wanted)))


@pytest.mark.parametrize("activation", NUMBERS)
def test_as_integers_of_rows_compute(activation: str, rng: np.random.Generator) -> None:
    for _ in range(3):
        shape = (*(int(n) for n in rng.integers(1, 5, int(rng.integers(0, 3)))), int(rng.integers(1, 30)))
        width, columns = (int(n) for n in rng.integers(1, 150, 2))
        weight, x = weight_of(width, columns, rng), rows_of((*shape, width), rng)
        if activation == "relu_squared":
            x = np.clip(x, -3, 3)
        for name, (y,) in everywhere(model_of(weight, shape, activation), {"x": x}).items():
            print(name, x.shape, columns)
            close(y, reference(x, weight, activation), x, weight)


@pytest.mark.parametrize("rows", [1, 7, 8, 16, 49, 130])
def test_every_number_of_rows(rows: int, rng: np.random.Generator) -> None:
    """Tiles of all heights, several tasks, on two threads and one."""
    width, columns = int(rng.integers(300, 400)), int(rng.integers(200, 700))
    weight, x = weight_of(width, columns, rng), rows_of((rows, width), rng)
    model = model_of(weight, ["rows"], "gelu")
    two, one = (native(model, threads).run(None, {"x": x})[0] for threads in (2, 1))
    close(two, reference(x, weight, "gelu"), x, weight)
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("where", ["native", "body"])
def test_a_row_is_the_same_in_any_company(where: str, rng: np.random.Generator) -> None:
    """Bit by bit: alone, beside rows a thousand times as large, and in another place."""
    weight, x = weight_of(96, 83, rng), rows_of((37, 96), rng)
    model = model_of(weight, ["rows"], "silu")
    session = native(model) if where == "native" else ort.InferenceSession(model.SerializeToString())
    (together,) = session.run(None, {"x": x})
    for row in rng.choice(37, 5, replace=False):
        np.testing.assert_array_equal(session.run(None, {"x": x[row : row + 1]})[0][0], together[row])
    order, others = rng.permutation(37), rows_of((20, 96), rng) * 1000
    (mixed,) = session.run(None, {"x": np.concatenate([others, x[order]])})
    np.testing.assert_array_equal(mixed[20:], together[order])


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_rows(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    weight = weight_of(24, 17, rng)
    lead: list[int | str] = ["batch", "tokens"]
    x = np.zeros((*shape, 24), np.float32)
    for name, (y,) in everywhere(model_of(weight, lead[: len(shape)], "gelu"), {"x": x}).items():
        assert y.shape == (*shape, 17), name


def test_sums_are_exact_where_all_is_largest() -> None:
    """Sums beyond 16 bits after two products, and beyond 24 bits in the end."""
    width = 4099
    weight = (np.full((width, 33), LARGEST, np.int8), np.ones(33, np.float32), np.zeros(33, np.float32))
    weight[0][:, 1], weight[0][::2, 2] = -LARGEST, -LARGEST
    x = np.full((3, width), float(LEVELS), np.float32)  # an integer is its own value
    x[1, 1::2], x[2] = 0, -x[2]
    wanted = x.astype(np.float64) @ weight[0]
    for name, (y,) in everywhere(model_of(weight, [3]), {"x": x}).items():
        np.testing.assert_array_equal(y, wanted.astype(np.float32), name)


def test_halves_go_to_the_even(rng: np.random.Generator) -> None:
    """With a step of 1, as `x` has it, halves are exact; the weight hands single integers on."""
    x = np.concatenate([np.arange(-19.5, 20), [-100, 155]]).astype(np.float32)
    weight = (np.eye(len(x), dtype=np.int8), np.ones(len(x), np.float32), np.zeros(len(x), np.float32))
    for name, (y,) in everywhere(model_of(weight, [1]), {"x": x[None]}).items():
        np.testing.assert_array_equal(y[0], np.rint(x), name)


def test_zeros_and_what_is_tiny_give_the_bias(rng: np.random.Generator) -> None:
    weight = weight_of(40, 21, rng)
    x = np.zeros((3, 40), np.float32)
    x[1], x[2] = 1e-40, -1e-32
    for name, (y,) in everywhere(model_of(weight, [3], "relu"), {"x": x}).items():
        np.testing.assert_array_equal(y, np.maximum(np.stack([weight[2]] * 3), 0), name)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, None])
def test_what_is_not_finite_spoils_its_row_alone(value: float | None, rng: np.random.Generator) -> None:
    weight, x = weight_of(50, 21, rng), rows_of((5, 50), rng)
    if value is None:
        x[2, 3], x[2, 4] = 3e38, -3e38  # a range that float32 does not have
    else:
        x[2, int(rng.integers(50))] = value
    others = np.arange(5) != 2
    for name, (y,) in everywhere(model_of(weight, [5], "relu"), {"x": x}).items():
        assert np.isnan(y[2]).all(), name
        close(y[others], reference(x[others], weight, "relu"), x[others], weight)


def test_weights_may_be_computed_and_shared(rng: np.random.Generator) -> None:
    """Of two nodes that share a weight each has its own scale and activation; a weight may come as an input."""
    weight, x = weight_of(60, 35, rng), rows_of((9, 60), rng)
    graph = graph_of(x=(np.float32, [9, 60]), w=(np.int8, [60, 35]))
    parts = {"shared": weight[0], "one": weight[1], "two": weight[1] * 2, "bias": weight[2]}
    w, one, two, bias = (gs.Constant(name, array) for name, array in parts.items())
    made = [
        add_node(graph, INT8_LINEAR, {"x": graph.inputs[0], "weight": of, "weight_scale": scale, "bias": bias}, name,
                 activation=NUMBERS[activation])
        for name, of, scale, activation in (
            ("a", w, one, "tanh"), ("b", w, two, "identity"), ("c", graph.inputs[1], one, "identity")
        )
    ]  # fmt: skip
    other = weight_of(60, 35, rng)[0]
    for a, b, c in everywhere(finish(graph, *made), {"x": x, "w": other}).values():
        close(a, reference(x, weight, "tanh"), x, weight)
        doubled = (weight[0], weight[1] * 2, weight[2])
        close(b, reference(x, doubled, "identity"), x, doubled)
        close(c, reference(x, (other, *weight[1:]), "identity"), x, (other, *weight[1:]))


@pytest.mark.parametrize(
    ("width", "shapes", "activation", "says"),
    [
        (25, {}, 0, "x is not float32"),
        (24, {"bias": 16}, 0, "not float32 \\[out_features\\]"),
        (24, {"weight_scale": 1}, 0, "not float32 \\[out_features\\]"),
        (24, {}, len(NUMBERS), "unknown activation"),
        (WIDEST + 1, {"rows": WIDEST + 1}, 0, "may overflow"),
    ],
)
def test_refuses_what_does_not_fit(width: int, shapes: dict[str, int], activation: int, says: str) -> None:
    graph = graph_of(x=(np.float32, ["rows", width]))
    parts = {"weight": np.zeros((shapes.get("rows", 24), 17), np.int8)}
    parts |= {name: np.zeros(shapes.get(name, 17), np.float32) for name in ("weight_scale", "bias")}
    constants = {name: gs.Constant(name, array) for name, array in parts.items()}
    model = finish(graph, add_node(graph, INT8_LINEAR, {"x": graph.inputs[0], **constants}, "y", activation=activation))
    with pytest.raises(Exception, match=says):
        native(model).run(None, {"x": np.zeros((2, width), np.float32)})
