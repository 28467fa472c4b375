"""Activations of half precision: reference bodies compute in float and give the type of what came in."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from dialects import ACTIVATIONS, FORMATS, finish, graph_of, mask_of, parted, some_blocks, weights
from onnx_graphsurgeon.exporters.onnx_exporter import dtype_to_onnx
from seeds import seeded

from trimtab.plugins import SELECT_BLOCKS, SPARSE_DOWN, SPARSE_HEAD, SPARSE_UP, add_node

TYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def cast(graph: gs.Graph, tensor: gs.Tensor, kind: np.dtype | type, name: str) -> gs.Variable:
    """ONNX Runtime's Python takes no bfloat16: it goes in and out as float32."""
    made = gs.Variable(name, kind, tensor.shape)
    graph.nodes.append(gs.Node("Cast", attrs={"to": dtype_to_onnx(kind)}, inputs=[tensor], outputs=[made]))
    return made


def run(graph: gs.Graph, outputs: list[gs.Variable], kind: np.dtype, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Of the reference bodies alone. That they give what is declared is for ONNX Runtime to see when it loads."""
    assert all(output.dtype == kind for output in outputs)
    model = finish(graph, *(cast(graph, output, np.float32, f"{output.name}_32") for output in outputs))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def near(found: np.ndarray, wanted: np.ndarray, kind: np.dtype, scale: float) -> None:
    """Rounded once at the end; sums in float32, and in between h is rounded like any activation."""
    eps = float(ml_dtypes.finfo(kind).eps)
    np.testing.assert_allclose(found, wanted, rtol=eps, atol=max(eps * 1e-3, 2e-6) * scale)


def rounded(values: np.ndarray, kind: np.dtype) -> np.ndarray:
    return values.astype(kind).astype(np.float64)


def in_half(parts: dict[str, gs.Tensor], dense: np.ndarray, kind: np.dtype) -> tuple[dict[str, gs.Tensor], np.ndarray]:
    """Scales in half precision too, and what the weights stand for then."""
    made = dict(parts)
    for name in (n for n in parts if n.endswith("_scale")):
        scale = parts[name].values
        made[name] = gs.Constant(name, scale.astype(kind))
        change = rounded(scale, kind) / scale
        dense = dense * (change[:, None] if scale.ndim == 1 else np.repeat(change, 32, axis=1))
    return made, dense


@pytest.mark.parametrize("beside", ["float", "half"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", TYPES)
def test_an_ffn_in_half_precision(kind: str, form: str, beside: str) -> None:
    """Scales, biases and importance in float, or in half precision as well."""
    rng, dtype = seeded(), TYPES[kind]
    tokens, width, block, count, k = 5, 64, 3, 11, 6
    keep, neurons = int(rng.integers(0, k + 1)), block * count
    graph = graph_of(x=(np.float32, ["tokens", width]), blocks=(np.int32, ["selections", "k"]))
    x, blocks = cast(graph, graph.inputs[0], dtype, "x16"), graph.inputs[1]
    bias, importance = (
        rng.standard_normal(neurons).astype(np.float32),
        rng.uniform(0.5, 1.5, neurons).astype(np.float32),
    )
    small = dtype if beside == "half" else np.dtype(np.float32)
    parts = {name: weights(name, neurons, width, form, rng) for name in ("up", "gate", "down")}
    ups, up = in_half(*parts["up"], small)
    gates, gate = in_half(*parts["gate"], small)
    downs, down = in_half(*parts["down"], small)
    others = {
        "up_bias": gs.Constant("up_bias", bias.astype(small)),
        "importance": gs.Constant("importance", importance.astype(small)),
    }
    h = add_node(
        graph,
        SPARSE_UP,
        {"x": x, "blocks": blocks} | ups | gates | others,
        "h",
        activation="silu",
        block=block,
        keep=keep,
    )
    y = add_node(graph, SPARSE_DOWN, {"h": h, "blocks": blocks} | downs, "y", block=block)
    feeds = {"blocks": some_blocks(tokens if keep % 2 else 1, count, k, rng)}
    mask = mask_of(feeds["blocks"], block, neurons, tokens)
    sums = np.zeros((tokens, count))
    while not sums.any() or not parted(sums, keep, k):  # equal ones would be ranked by their rounding
        feeds["x"] = rng.standard_normal((tokens, width)).astype(np.float32)
        value = rounded(feeds["x"], dtype)
        dense = ACTIVATIONS["silu"](value @ gate.T) * (value @ up.T + rounded(bias, small))
        sums = (np.abs(dense) * rounded(importance, small) * mask).reshape(tokens, count, block).sum(-1)
    found_h, found_y = run(graph, [h, y], dtype, feeds)

    if keep:
        mask = mask * np.repeat(sums >= np.sort(sums, -1)[:, -keep, None], block, -1)
    rows = np.argsort(-mask_of(feeds["blocks"], block, neurons, tokens), axis=-1, kind="stable")[:, : k * block]
    near(found_h, np.take_along_axis(dense * mask, rows, -1), dtype, float(np.abs(dense).max()))
    whole = np.zeros((tokens, neurons))
    np.put_along_axis(whole, rows, found_h.astype(np.float64), -1)
    near(found_y, whole @ down, dtype, float(np.abs(whole).max() * np.abs(down).max() * neurons))


@pytest.mark.parametrize("kind", TYPES)
def test_a_head_in_half_precision(kind: str) -> None:
    rng, dtype = seeded(), TYPES[kind]
    graph = graph_of(x=(np.float32, ["tokens", 64]), rows=(np.int32, ["tokens", "k"]))
    parts, weight = weights("weight", 90, 64, "int8", rng)
    bias = rng.standard_normal(90).astype(np.float32)
    given = {"x": cast(graph, graph.inputs[0], dtype, "x16"), "blocks": graph.inputs[1]} | parts
    logits = add_node(graph, SPARSE_HEAD, given | {"weight_bias": gs.Constant("b", bias.astype(dtype))}, "logits")
    feeds = {"x": rng.standard_normal((3, 64)).astype(np.float32), "rows": some_blocks(3, 90, 11, rng)}
    (found,) = run(graph, [logits], dtype, feeds)
    dense = rounded(feeds["x"], dtype) @ weight.T + rounded(bias, dtype)
    near(found, np.take_along_axis(dense, feeds["rows"].astype(np.int64), -1), dtype, float(np.abs(dense).max()))


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("kind", TYPES)
def test_scores_in_half_precision(kind: str, shared: int) -> None:
    rng, dtype = seeded(), TYPES[kind]
    graph = graph_of(scores=(np.float32, ["tokens", 40]))
    blocks = add_node(
        graph, SELECT_BLOCKS, {"scores": cast(graph, graph.inputs[0], dtype, "s16")}, "blocks", k=7, shared=shared
    )
    assert blocks.dtype == np.int32
    scores = rng.integers(-50, 50, (6, 40)).astype(np.float32)
    session = ort.InferenceSession(finish(graph, blocks).SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"scores": scores})
    rows = scores.max(0, keepdims=True) if shared else scores
    np.testing.assert_array_equal(found, np.sort(np.argsort(-rows, -1, kind="stable")[:, :7], -1))
