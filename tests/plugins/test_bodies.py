"""Reference bodies as others meet them: folded by graphsurgeon before TensorRT, and asked for no rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from dialects import some_blocks
from seeds import seeded

from trimtab.plugins import OPS, add_multi_output_node

WIDTH, NEURONS, BLOCK, HEADS = 8, 12, 3, 2
Feeds = dict[str, np.ndarray]


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def chosen(rng: np.random.Generator, rows: int, shared: bool = False) -> np.ndarray:
    return (
        some_blocks(1 if shared else rows, NEURONS // BLOCK, 2, rng) if rows or shared else np.zeros((0, 2), np.int32)
    )


def offsets(rows: int) -> np.ndarray:
    """Of two samples; of none where there are no rows."""
    return np.array([0, rows // 2, rows][: 3 if rows else 1], np.int32)


def up(rng: np.random.Generator, rows: int) -> Feeds:
    both = {name: floats(rng, NEURONS, WIDTH) for name in ("up", "gate")}
    biases = {f"{name}_bias": floats(rng, NEURONS) for name in ("up", "gate")}
    return {"x": floats(rng, rows, WIDTH), "blocks": chosen(rng, rows)} | both | biases


def down(rng: np.random.Generator, rows: int) -> Feeds:
    h = floats(rng, rows, 2 * BLOCK)
    return {"h": h, "blocks": chosen(rng, rows), "down": floats(rng, NEURONS, WIDTH)}


def down_int8(rng: np.random.Generator, rows: int) -> Feeds:
    q = rng.integers(-127, 128, (NEURONS, WIDTH)).astype(np.int8)
    return down(rng, rows) | {"down": q, "down_scale": np.abs(floats(rng, NEURONS))}


def down_int4(rng: np.random.Generator, rows: int) -> Feeds:
    q = rng.integers(0, 256, (NEURONS, 32)).astype(np.uint8)
    return down(rng, rows) | {"down": q, "down_scale": np.abs(floats(rng, NEURONS, 2))}


def head(rng: np.random.Generator, rows: int) -> Feeds:
    parts = {"weight": floats(rng, NEURONS, WIDTH), "weight_bias": floats(rng, NEURONS)}
    return {"x": floats(rng, rows, WIDTH), "blocks": chosen(rng, rows)} | parts


def linear(rng: np.random.Generator, rows: int, four: bool = False) -> Feeds:
    width = 64 if four else WIDTH
    weight = rng.integers(0, 256, (NEURONS, width // 2)) if four else rng.integers(-127, 128, (width, NEURONS))
    scale = np.abs(floats(rng, *((NEURONS, width // 32) if four else (NEURONS,))))
    given = {"weight": weight.astype(np.uint8 if four else np.int8), "weight_scale": scale}
    return {"x": floats(rng, rows, width), "bias": floats(rng, NEURONS)} | given


def attention(rng: np.random.Generator, rows: int) -> Feeds:
    q, k, v = (floats(rng, rows, WIDTH) for _ in range(3))
    return {"q": q, "k": k, "v": v, "offsets": offsets(rows)}


def keep_samples(rng: np.random.Generator, rows: int) -> Feeds:
    samples = len(offsets(rows)) - 1
    threshold, uncertainty = np.full(samples, 0.5, np.float32), rng.random(samples).astype(np.float32)
    return {
        "uncertainty": uncertainty, "threshold": threshold, "offsets": offsets(rows), "x": floats(rng, rows, WIDTH),
    }  # fmt: skip


def keep_tokens(rng: np.random.Generator, rows: int) -> Feeds:
    samples = len(offsets(rows)) - 1
    importance = rng.random(rows).astype(np.float32)
    return {"importance": importance, "offsets": offsets(rows), "threshold": np.full(samples, 0.5, np.float32)}


CASES: list[tuple[str, dict[str, Any], Callable[[np.random.Generator, int], Feeds]]] = [
    ("GatherBlocks", {"block": BLOCK}, lambda rng, n: {"x": floats(rng, n, NEURONS), "blocks": chosen(rng, n)}),
    *(("Glu", {"activation": act}, lambda rng, n: {"x": floats(rng, n, WIDTH)}) for act in ("gelu", "silu")),
    ("Int4Linear", {}, lambda rng, n: linear(rng, n, four=True)),
    *(("Int8Linear", {"activation": number}, linear) for number in (0, 1, 4)),
    ("KeepSamples", {}, keep_samples),
    *(("KeepTokens", {"mode": mode}, keep_tokens) for mode in ("threshold", "ratio")),
    ("PackedAttention", {"heads": HEADS}, attention),
    ("PoolTokens", {}, lambda rng, n: {"x": floats(rng, n, WIDTH), "offsets": offsets(n)}),
    *(
        ("SelectBlocks", {"k": 2} | options, lambda rng, n: {"scores": floats(rng, n, 4)})
        for options in ({}, {"shared": 1}, {"shards": 2}, {"dense_above": 3}, {"at_most": 1})
    ),
    *(("SparseDown", {"block": BLOCK}, make) for make in (down, down_int8, down_int4)),
    ("SparseHead", {}, head),
    *(("SparseUp", {"block": BLOCK, "activation": act, "keep": 1}, up) for act in ("gelu_tanh", "quick_gelu")),
]  # fmt: skip


def model_of(op: str, attributes: dict[str, Any], feeds: Feeds) -> onnx.ModelProto:
    """The op by itself: every input is one of the graph, of any number of rows."""
    inputs = {
        name: gs.Variable(name, array.dtype, [f"{name}.0", *array.shape[1:]] if array.ndim else [])
        for name, array in feeds.items()
    }
    graph = gs.Graph(inputs=list(inputs.values()), opset=21, ir_version=10)
    graph.outputs = list(add_multi_output_node(graph, OPS[op], inputs, "it", **attributes))
    return gs.export_onnx(graph)


def ran(model: onnx.ModelProto, feeds: Feeds) -> list[np.ndarray]:
    """By the body, without the library of kernels."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)  # type: ignore[no-any-return]


def test_every_op_is_here() -> None:
    assert {op for op, _, _ in CASES} == set(OPS)


@pytest.mark.parametrize(("op", "attributes", "make"), CASES, ids=[f"{op} {attrs}" for op, attrs, _ in CASES])
def test_folding_constants_changes_nothing(
    op: str, attributes: dict[str, Any], make: Callable[[np.random.Generator, int], Feeds]
) -> None:
    """As Polygraphy's `surgeon sanitize --fold-constants` does it, in functions too."""
    feeds = make(seeded(), 6)
    model = model_of(op, attributes, feeds)
    folded = gs.export_onnx(gs.import_onnx(model).fold_constants(recurse_functions=True).cleanup())
    for have, want in zip(ran(folded, feeds), ran(model, feeds), strict=True):
        np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize(("op", "attributes", "make"), CASES, ids=[f"{op} {attrs}" for op, attrs, _ in CASES])
def test_of_no_rows_comes_an_empty_answer(
    op: str, attributes: dict[str, Any], make: Callable[[np.random.Generator, int], Feeds]
) -> None:
    rng = seeded()
    some, none = make(rng, 6), make(rng, 0)
    model = model_of(op, attributes, some)
    for full, empty in zip(ran(model, some), ran(model, none), strict=True):
        assert empty.dtype == full.dtype and empty.ndim == full.ndim
        assert empty.size == 0 or attributes.get("shared") or op in ("KeepSamples", "KeepTokens")
        assert empty.shape[1:] == full.shape[1:] or "dense_above" in attributes
