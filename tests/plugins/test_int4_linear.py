"""Int4Linear: products with int4 weights in blocks, whose sums are of integers, and which no other row changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from dialects import everywhere, finish, graph_of, native
from seeds import seeded

from trimtab.plugins import INT4_LINEAR, add_node
from trimtab.plugins.int4_linear import BLOCK, LARGEST

BFLOAT16, FLOAT = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
Weight = tuple[np.ndarray, np.ndarray, np.ndarray]


def weight_of(width: int, columns: int, rng: np.random.Generator, dtype: np.dtype[Any] = FLOAT) -> Weight:
    """Integers [columns, width] in [0, 15], scales of both signs [columns, blocks], bias; a row of the least."""
    integers = rng.integers(0, 16, (columns, width)).astype(np.uint8)
    integers[0] = 0
    scale = rng.uniform(0.5, 1, (columns, width // BLOCK)) * rng.choice([-1, 1], (columns, width // BLOCK))
    bias = rng.standard_normal(columns).astype(np.float32)
    return integers, (scale / np.sqrt(width) / 8).astype(dtype), bias


def packed(integers: np.ndarray) -> np.ndarray:
    halves: np.ndarray = integers[:, 0::2] | integers[:, 1::2] << 4
    return halves


def constants_of(weight: Weight) -> dict[str, gs.Constant]:
    parts = {"weight": packed(weight[0]), "weight_scale": weight[1], "bias": weight[2]}
    return {name: gs.Constant(name, array) for name, array in parts.items()}


def model_of(weight: Weight, lead: Sequence[int | str]) -> onnx.ModelProto:
    graph = graph_of(x=(np.float32, [*lead, weight[0].shape[1]]))
    return finish(graph, add_node(graph, INT4_LINEAR, {"x": graph.inputs[0], **constants_of(weight)}, "y"))


def dense(weight: Weight) -> np.ndarray:
    """W [width, columns], in float64."""
    scale = weight[1].astype(np.float32).astype(np.float64)
    return ((weight[0] - 8.0) * np.repeat(scale, BLOCK, axis=1)).T


def rounded(x: np.ndarray) -> np.ndarray:
    """What the integers of `x` [..., width] stand for, in float64; their choice is that of float32."""
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    reach = np.maximum(np.abs(blocks).max(-1, keepdims=True), np.float32(2**-100))
    steps = np.rint(blocks * (np.float32(LARGEST) / reach))
    return (steps * (reach / np.float32(LARGEST)).astype(np.float64)).reshape(x.shape)


def reference(x: np.ndarray, weight: Weight) -> np.ndarray:
    return rounded(x) @ dense(weight) + weight[2]


def rows_of(shape: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Rows whose blocks differ by some orders of magnitude in size."""
    size = 10.0 ** rng.integers(-3, 3, (*shape[:-1], shape[-1] // BLOCK))
    return (rng.standard_normal(shape) * np.repeat(size, BLOCK, axis=-1)).astype(np.float32)


def close(y: np.ndarray, wanted: np.ndarray, x: np.ndarray, weight: Weight) -> None:
    """Up to float32: sums of a block are exact, and those of all blocks are as many roundings."""
    assert y.shape == wanted.shape and y.dtype == np.float32
    size = np.abs(x).astype(np.float64) @ np.abs(dense(weight)) + np.abs(weight[2])
    assert np.all(np.abs(y - wanted) <= 2e-6 * (size + np.abs(x).max(-1, initial=0, keepdims=True) * 0.01 + 1e-6))


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT16], ids=str)
def test_as_its_integers_compute(dtype: np.dtype[Any]) -> None:
    rng = seeded()
    for _ in range(4):
        shape = (*(int(n) for n in rng.integers(1, 5, int(rng.integers(0, 3)))), int(rng.integers(1, 30)))
        width, columns = BLOCK * int(rng.integers(1, 9)), int(rng.integers(1, 150))
        weight, x = weight_of(width, columns, rng, dtype), rows_of((*shape, width), rng)
        for name, (y,) in everywhere(model_of(weight, shape), {"x": x}).items():
            print(name, x.shape, columns)
            close(y, reference(x, weight), x, weight)


@pytest.mark.parametrize("rows", [1, 2, 5, 12, 13, 49, 130])
def test_every_number_of_rows(rows: int) -> None:
    """Tiles of all heights, several tasks, on two threads and one."""
    rng = seeded()
    width, columns = BLOCK * int(rng.integers(9, 14)), int(rng.integers(400, 900))
    weight, x = weight_of(width, columns, rng, BFLOAT16), rows_of((rows, width), rng)
    model = model_of(weight, ["rows"])
    two, one = (native(model, threads).run(None, {"x": x})[0] for threads in (2, 1))
    close(two, reference(x, weight), x, weight)
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("where", ["native", "body"])
def test_a_row_is_the_same_in_any_company(where: str) -> None:
    """Bit by bit by the kernel: alone, beside rows a thousand times as large, and in another place."""
    rng = seeded()
    weight, x = weight_of(96, 83, rng), rows_of((37, 96), rng)
    model = model_of(weight, ["rows"])
    session = native(model) if where == "native" else ort.InferenceSession(model.SerializeToString())
    (together,) = session.run(None, {"x": x})
    order, others = rng.permutation(37), rows_of((20, 96), rng) * 1000
    (mixed,) = session.run(None, {"x": np.concatenate([others, x[order]])})
    alone = np.concatenate([session.run(None, {"x": row[None]})[0] for row in x])
    if where == "native":
        np.testing.assert_array_equal(mixed[20:], together[order])
        np.testing.assert_array_equal(alone, together)
    else:  # its product is one of floats
        close(mixed[20:], together[order], x[order], weight)
        close(alone, together, x, weight)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    weight = weight_of(64, 17, seeded())
    lead: list[int | str] = ["batch", "tokens"]
    x = np.zeros((*shape, 64), np.float32)
    for name, (y,) in everywhere(model_of(weight, lead[: len(shape)]), {"x": x}).items():
        assert y.shape == (*shape, 17), name


def test_sums_of_a_block_are_exact_where_all_is_largest() -> None:
    """The largest weight and the least, with the largest x of both signs."""
    integers = np.full((35, 96), 15, np.uint8)
    integers[1], integers[2, ::2] = 0, 0
    weight = (integers, np.ones((35, 3), np.float32), np.zeros(35, np.float32))
    x = np.full((3, 96), float(LARGEST), np.float32)  # an integer is its own value
    x[1], x[2, 1::2] = -LARGEST, -LARGEST
    wanted = x.astype(np.float64) @ dense(weight)
    for name, (y,) in everywhere(model_of(weight, [3]), {"x": x}).items():
        np.testing.assert_array_equal(y, wanted.astype(np.float32), name)


def test_halves_go_to_the_even() -> None:
    """With a step of 1, as `x` has it, halves are exact; the weight hands single integers on."""
    x = np.concatenate([np.arange(-15, 16) + 0.5, [LARGEST]]).astype(np.float32)
    weight = (8 + np.eye(BLOCK, dtype=np.uint8), np.ones((BLOCK, 1), np.float32), np.zeros(BLOCK, np.float32))
    for name, (y,) in everywhere(model_of(weight, [1]), {"x": x[None]}).items():
        np.testing.assert_array_equal(y[0], np.rint(x), name)


def test_zeros_and_what_is_tiny_give_the_bias() -> None:
    weight = weight_of(64, 21, seeded())
    x = np.zeros((3, 64), np.float32)
    x[1], x[2] = 1e-40, -1e-32
    for name, (y,) in everywhere(model_of(weight, [3]), {"x": x}).items():
        np.testing.assert_allclose(y, np.stack([weight[2]] * 3), rtol=0, atol=1e-28, err_msg=name)


def test_scales_beyond_float32_together_leave_zeros() -> None:
    """The product of two scales may be infinite; that of nothing with it is nothing."""
    integers = np.full((17, 32), 8, np.uint8)
    weight = (integers, np.full((17, 1), 1e30, np.float32), np.zeros(17, np.float32))
    for name, (y,) in everywhere(model_of(weight, [2]), {"x": np.full((2, 32), 1e12, np.float32)}).items():
        np.testing.assert_array_equal(y, 0, name)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_row_alone(value: float) -> None:
    rng = seeded()
    weight, x = weight_of(96, 21, rng), rows_of((5, 96), rng)
    x[2, int(rng.integers(96))] = value
    others = np.arange(5) != 2
    for name, (y,) in everywhere(model_of(weight, [5]), {"x": x}).items():
        assert np.isnan(y[2]).all(), name
        close(y[others], reference(x[others], weight), x[others], weight)


def test_weights_may_be_computed_and_shared() -> None:
    """Of two nodes that share integers each has its own scales; integers may come as an input."""
    rng = seeded()
    weight, x = weight_of(64, 35, rng), rows_of((9, 64), rng)
    graph = graph_of(x=(np.float32, [9, 64]), w=(np.uint8, [35, 32]))
    parts = constants_of(weight)
    doubled = (weight[0], weight[1] * 2, weight[2])
    two = gs.Constant("two", doubled[1])
    made = [
        add_node(graph, INT4_LINEAR, {"x": graph.inputs[0], **parts, **other}, name)
        for name, other in (("a", {}), ("b", {"weight_scale": two}), ("c", {"weight": graph.inputs[1]}))
    ]
    other = weight_of(64, 35, rng)[0]
    for a, b, c in everywhere(finish(graph, *made), {"x": x, "w": packed(other)}).values():
        close(a, reference(x, weight), x, weight)
        close(b, reference(x, doubled), x, doubled)
        close(c, reference(x, (other, *weight[1:])), x, (other, *weight[1:]))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"x": 96}, "x is not float32"),
        ({"weight": [17, 24]}, "not a multiple of 32"),
        ({"x": 0, "weight": [17, 0], "weight_scale": [17, 0]}, "not a multiple of 32"),
        ({"weight_scale": [17, 1]}, r"\[out_features, in_features / 32\]"),
        ({"weight_scale": [16, 2]}, r"\[out_features, in_features / 32\]"),
        ({"bias": [16]}, "bias is not float32"),
    ],
)
def test_refuses_what_does_not_fit(given: dict[str, Any], says: str) -> None:
    shapes = {"x": 64, "weight": [17, 32], "weight_scale": [17, 2], "bias": [17]} | given
    graph = graph_of(x=(np.float32, ["rows", shapes["x"]]))
    types = {"weight": np.uint8, "weight_scale": np.float32, "bias": np.float32}
    parts = {name: gs.Constant(name, np.zeros(shapes[name], dtype)) for name, dtype in types.items()}
    model = finish(graph, add_node(graph, INT4_LINEAR, {"x": graph.inputs[0], **parts}, "y"))
    with pytest.raises(Exception, match=says):
        native(model).run(None, {"x": np.zeros((2, shapes["x"]), np.float32)})
