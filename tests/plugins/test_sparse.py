"""SparseUp, SparseDown and SparseHead: kernel, reference body, ONNX's evaluator and dense masked computation agree."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from dialects import (
    ACTIVATIONS,
    FORMATS,
    close,
    everywhere,
    finish,
    graph_of,
    mask_of,
    native,
    parted,
    some_blocks,
    summed,
    weights,
)  # fmt: skip
from seeds import seeded

from trimtab.plugins import SPARSE_DOWN, SPARSE_HEAD, SPARSE_UP, add_node

SELECTIONS = [(1, 1), (4, 4), (5, 1), (2, 2)]
"""(tokens, selections): one token; each its own; one for all."""


def activations(mask: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """Of the chosen neurons alone, in order, [tokens, chosen], of `dense` [tokens, neurons]."""
    return np.stack([row[chosen != 0] for row, chosen in zip(dense, mask, strict=True)])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("tokens", "selections"), SELECTIONS)
@pytest.mark.parametrize("form", FORMATS)
def test_an_ffn_of_the_chosen_neurons(form: str, tokens: int, selections: int, gated: bool) -> None:
    rng = seeded()
    block, count = int(rng.integers(1, 5)), int(rng.integers(3, 30))
    width, neurons, k = 32 * int(rng.integers(1, 6)), block * count, int(rng.integers(1, count + 1))
    graph = graph_of(x=(np.float32, ["tokens", width]), blocks=(np.int32, ["selections", "k"]))
    x, blocks = graph.inputs
    ups, up = weights("up", neurons, width, form, rng)
    downs, down = weights("down", neurons, width, form, rng)
    bias = rng.standard_normal(neurons).astype(np.float32)
    inputs: dict[str, gs.Tensor] = {"x": x, "blocks": blocks, "up_bias": gs.Constant("up_bias", bias)} | ups
    if gated:
        gates, gate = weights("gate", neurons, width, form, rng)
        inputs |= gates
    h = add_node(graph, SPARSE_UP, inputs, "h", activation="silu", block=block)
    y = add_node(graph, SPARSE_DOWN, {"h": h, "blocks": blocks} | downs, "y", block=block)
    model = finish(graph, h, y)
    feeds = {
        "x": rng.standard_normal((tokens, width)).astype(np.float32),
        "blocks": some_blocks(selections, count, k, rng),
    }
    z = feeds["x"] @ up.T + bias
    dense = ACTIVATIONS["silu"](feeds["x"] @ gate.T) * z if gated else ACTIVATIONS["silu"](z)
    mask = mask_of(feeds["blocks"], block, neurons, tokens)
    spread = summed(feeds["x"], up)
    if gated:  # of a product both factors err
        spread = (
            spread * np.abs(ACTIVATIONS["silu"](feeds["x"] @ gate.T)).max() + summed(feeds["x"], gate) * np.abs(z).max()
        )
    scale = max(spread, float(np.abs(dense).max()))
    for found_h, found_y in everywhere(model, feeds).values():
        close(found_h, activations(mask, dense), form, scale)
        close(found_y, (mask * dense) @ down, form, scale * np.sqrt(neurons) * float(np.abs(down).max()))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
@pytest.mark.parametrize("keep", [0, 2])
@pytest.mark.parametrize("form", FORMATS)
def test_no_rows(form: str, keep: int, shape: tuple[int, int]) -> None:
    """With a choice for each token, and with one for all."""
    rng = seeded()
    width, block, count, k = 64, 3, 10, 4
    graph = graph_of(x=(np.float32, ["batch", "tokens", width]), blocks=(np.int32, ["selections", k]))
    x, blocks = graph.inputs
    ups, downs = (weights(name, block * count, width, form, rng)[0] for name in ("up", "down"))
    counts = {"importance": gs.Constant("importance", rng.random(block * count).astype(np.float32))} if keep else {}
    h = add_node(graph, SPARSE_UP, {"x": x, "blocks": blocks} | ups | counts, "h", block=block, keep=keep)
    y = add_node(graph, SPARSE_DOWN, {"h": h, "blocks": blocks} | downs, "y", block=block)
    head = dict(zip(("weight", "weight_scale"), ups.values(), strict=False))
    logits = add_node(graph, SPARSE_HEAD, {"x": x, "blocks": blocks} | head, "logits")
    model = finish(graph, h, y, logits)
    for selections in (0, 1):
        feeds = {"x": np.zeros((*shape, width), np.float32), "blocks": some_blocks(1, count, k, rng)[:selections]}
        for where, found in everywhere(model, feeds).items():
            assert [f.shape for f in found] == [(*shape, n) for n in (k * block, width, k)], where


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    rng = seeded()
    graph = graph_of(x=(np.float32, ["batch", "tokens", 48]), blocks=(np.int32, ["selections", "k"]))
    inputs, up = weights("up", 40, 48, "float32", rng)
    h = add_node(
        graph, SPARSE_UP, {"x": graph.inputs[0], "blocks": graph.inputs[1]} | inputs, "h", activation=activation
    )
    feeds = {"x": rng.standard_normal((2, 3, 48)).astype(np.float32) / 4, "blocks": some_blocks(6, 40, 7, rng)}
    dense = ACTIVATIONS[activation](feeds["x"].reshape(6, 48) @ up.T)
    wanted = activations(mask_of(feeds["blocks"], 1, 40, 6), dense).reshape(2, 3, 7)
    for (found,) in everywhere(finish(graph, h), feeds).values():
        close(found, wanted)


@pytest.mark.parametrize("form", FORMATS)
def test_all_blocks_are_the_dense_ffn(form: str) -> None:
    """The exact end of the dial, for a prompt: more tokens than any tile of the kernels holds."""
    rng = seeded()
    tokens, width, neurons = 37, 96, 60
    graph = graph_of(x=(np.float32, ["tokens", width]), blocks=(np.int32, [1, "k"]))
    ups, up = weights("up", neurons, width, form, rng)
    downs, down = weights("down", neurons, width, form, rng)
    x, blocks = graph.inputs
    h = add_node(graph, SPARSE_UP, {"x": x, "blocks": blocks} | ups, "h", activation="relu", block=4)
    y = add_node(graph, SPARSE_DOWN, {"h": h, "blocks": blocks} | downs, "y", block=4)
    feeds = {
        "x": rng.standard_normal((tokens, width)).astype(np.float32),
        "blocks": np.arange(15, dtype=np.int32)[None],
    }
    for (found,) in everywhere(finish(graph, y), feeds).values():
        close(found, np.maximum(feeds["x"] @ up.T, 0) @ down, form)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("tokens", "selections"), [*SELECTIONS, (11, 1)])
@pytest.mark.parametrize("form", ["float32", "float16", "bfloat16"])
def test_keeps_the_blocks_that_add_most(form: str, tokens: int, selections: int, gated: bool) -> None:
    rng = seeded()
    block, count = int(rng.integers(1, 5)), int(rng.integers(6, 30))
    width, neurons, k = 48, block * count, int(rng.integers(4, count + 1))
    keep = int(rng.integers(1, k + 2))  # one more than there are, too
    graph = graph_of(x=(np.float32, ["tokens", width]), blocks=(np.int32, ["selections", "k"]))
    x, blocks = graph.inputs
    ups, up = weights("up", neurons, width, form, rng)
    downs, down = weights("down", neurons, width, form, rng)
    importance = rng.uniform(0.5, 1.5, neurons).astype(np.float32)  # two that are all but 0 never part
    inputs: dict[str, gs.Tensor] = {"x": x, "blocks": blocks, "importance": gs.Constant("importance", importance)} | ups
    if gated:
        gates, gate = weights("gate", neurons, width, form, rng)
        inputs |= gates
    h = add_node(graph, SPARSE_UP, inputs, "h", activation="silu", block=block, keep=keep)
    y = add_node(graph, SPARSE_DOWN, {"h": h, "blocks": blocks} | downs, "y", block=block)
    feeds = {"blocks": some_blocks(selections, count, k, rng)}
    mask = mask_of(feeds["blocks"], block, neurons, tokens)
    sums = np.zeros((tokens, count))
    while not sums.any() or not parted(sums, keep, k):  # equal ones would be ranked by their rounding
        feeds["x"] = rng.standard_normal((tokens, width)).astype(np.float32)
        z = feeds["x"] @ up.T
        dense = ACTIVATIONS["silu"](feeds["x"] @ gate.T) * z if gated else ACTIVATIONS["silu"](z)
        sums = (np.abs(dense) * importance * mask).reshape(tokens, count, block).sum(-1)
    cut = np.sort(sums, -1)[:, -min(keep, k), None]
    kept = dense * mask * np.repeat(sums >= cut, block, -1)
    for found_h, found_y in everywhere(finish(graph, h, y), feeds).values():
        close(found_h, activations(mask, kept), form)
        close(found_y, kept @ down, form, float(np.abs(dense).max() * np.abs(down).max() * np.sqrt(neurons)))


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("form", FORMATS)
def test_rows_of_zeros_add_nothing(form: str, block: int) -> None:
    """One token's rows are skipped where its activations are zero: some, all, and those between others."""
    rng = seeded()
    width, neurons = 96, 24 * block
    graph = graph_of(h=(np.float32, ["tokens", "chosen"]), blocks=(np.int32, ["tokens", "k"]))
    downs, down = weights("down", neurons, width, form, rng)
    h, blocks = graph.inputs
    model = native(finish(graph, add_node(graph, SPARSE_DOWN, {"h": h, "blocks": blocks} | downs, "y", block=block)))
    for share in (0.0, 0.3, 1.0):
        for tokens in (1, 5):
            value = rng.standard_normal((tokens, 11 * block)).astype(np.float32)
            value *= rng.random(value.shape) < share
            chosen = some_blocks(tokens, 24, 11, rng)
            rows = (chosen[:, :, None] * block + np.arange(block)).reshape(tokens, -1)
            wanted = np.einsum("tn,tnw->tw", value, down[rows])
            (found,) = model.run(None, {"h": value, "blocks": chosen})
            close(found, wanted, form, float(np.abs(down).max() * 4 * np.sqrt(11 * block)))


@pytest.mark.parametrize("tokens", [8, 100, 131])
@pytest.mark.parametrize("form", FORMATS)
def test_many_tokens_with_the_same_rows(form: str, tokens: int) -> None:
    """More tokens, places and rows than the kernels take at a time, none of them a multiple of what they take."""
    rng = seeded()
    width, neurons, k = 1100 if form != "int4" else 1120, 303, 97
    graph = graph_of(x=(np.float32, ["batch", "tokens", width]), blocks=(np.int32, [1, "k"]))
    gates, gate = weights("gate", neurons, width, form, rng)
    ups, up = weights("up", neurons, width, form, rng)
    downs, down = weights("down", neurons, width, form, rng)
    x, blocks = graph.inputs
    h = add_node(graph, SPARSE_UP, {"x": x, "blocks": blocks} | ups | gates, "h", activation="silu", block=3)
    y = add_node(graph, SPARSE_DOWN, {"h": h, "blocks": blocks} | downs, "y", block=3)
    value = rng.standard_normal((1, tokens, width)).astype(np.float32) / 32
    feeds = {"x": value, "blocks": some_blocks(1, neurons // 3, k, rng)}
    dense = ACTIVATIONS["silu"](value[0] @ gate.T) * (value[0] @ up.T)
    (found,) = native(finish(graph, y)).run(None, feeds)
    mask = mask_of(feeds["blocks"], 3, neurons, tokens)
    close(found[0], (mask * dense) @ down, form, float(np.sqrt(neurons) * np.abs(dense).max() * np.abs(down).max()))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("bias", [False, True])
def test_head_gives_the_logits_of_its_candidates(form: str, bias: bool) -> None:
    rng = seeded()
    graph = graph_of(x=(np.float32, ["tokens", 64]), rows=(np.int32, ["tokens", "k"]))
    inputs, weight = weights("weight", 90, 64, form, rng)
    given: dict[str, gs.Tensor] = {"x": graph.inputs[0], "blocks": graph.inputs[1]} | inputs
    added = rng.standard_normal(90).astype(np.float32) if bias else np.zeros(90, np.float32)
    if bias:
        given["weight_bias"] = gs.Constant("bias", added)
    logits = add_node(graph, SPARSE_HEAD, given, "logits")
    feeds = {"x": rng.standard_normal((3, 64)).astype(np.float32), "rows": some_blocks(3, 90, 11, rng)}
    dense = feeds["x"] @ weight.T + added
    wanted = activations(mask_of(feeds["rows"], 1, 90, 3), dense)
    for (found,) in everywhere(finish(graph, logits), feeds).values():
        close(found, wanted, form, float(np.abs(dense).max()))


@pytest.mark.parametrize("width", [1, 3, 17, 63, 200])
@pytest.mark.parametrize("form", ["float32", "float16", "bfloat16", "int8"])
def test_widths_that_fill_no_vector(form: str, width: int) -> None:
    rng = seeded()
    graph = graph_of(x=(np.float32, ["tokens", width]), blocks=(np.int32, [1, "k"]))
    ups, up = weights("up", 13, width, form, rng)
    downs, down = weights("down", 13, width, form, rng)
    x, blocks = graph.inputs
    h = add_node(graph, SPARSE_UP, {"x": x, "blocks": blocks} | ups, "h")
    y = add_node(graph, SPARSE_DOWN, {"h": h, "blocks": blocks} | downs, "y")
    feeds = {"x": rng.standard_normal((1, width)).astype(np.float32), "blocks": some_blocks(1, 13, 6, rng)}
    mask, dense = mask_of(feeds["blocks"], 1, 13, 1), feeds["x"] @ up.T
    (found,) = native(finish(graph, y)).run(None, feeds)
    close(found, (mask * dense) @ down, form, float(np.abs(dense).max() * np.abs(down).max()))


@pytest.mark.parametrize("width", [256, 288, 736, 2048, 2080, 4896])
@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("form", FORMATS)
def test_rows_of_many_vectors(form: str, block: int, width: int) -> None:
    """Whole vectors of every instruction set, what is left of one, and more outputs than a tile of kernels holds."""
    rng = seeded()
    tokens, count, k = int(rng.integers(1, 4)), 9, int(rng.integers(1, 9))
    graph = graph_of(x=(np.float32, ["tokens", width]), blocks=(np.int32, ["selections", "k"]))
    gates, gate = weights("gate", block * count, width, form, rng)
    ups, up = weights("up", block * count, width, form, rng)
    downs, down = weights("down", block * count, width, form, rng)
    x, blocks = graph.inputs
    h = add_node(graph, SPARSE_UP, {"x": x, "blocks": blocks} | ups | gates, "h", activation="relu", block=block)
    y = add_node(graph, SPARSE_DOWN, {"h": h, "blocks": blocks} | downs, "y", block=block)
    feeds = {"x": rng.standard_normal((tokens, width)).astype(np.float32), "blocks": some_blocks(1, count, k, rng)}
    z, u = feeds["x"] @ gate.T, feeds["x"] @ up.T
    dense = np.maximum(z, 0) * u
    mask = mask_of(feeds["blocks"], block, block * count, tokens)
    found_h, found_y = native(finish(graph, h, y)).run(None, feeds)
    scale = float(np.abs(z).max() * np.abs(u).max())  # a small factor's error is that of large sums, times the other
    together = block >= 8 and tokens >= 3
    close(found_h, activations(mask, dense), form, scale, together=together)
    size = scale * np.sqrt(block * k) * float(np.abs(down).max())
    close(found_y, (mask * dense) @ down, form, size, together=together)


def _bad(**change: object) -> gs.Graph:
    rng = seeded()
    graph = graph_of(x=(np.float32, ["tokens", 32]), blocks=(np.int32, ["selections", "k"]))
    inputs, _ = weights("up", 12, 32, "int8", rng)
    if "scale" in change:
        inputs["up_scale"] = gs.Constant("up_scale", np.ones(5, np.float32))
    if "no_scale" in change:
        del inputs["up_scale"]
    if "width" in change:
        inputs["up"] = gs.Constant("up", np.zeros((12, 33), np.int8))
    given = {"x": graph.inputs[0], "blocks": graph.inputs[1]} | inputs
    finish(graph, add_node(graph, SPARSE_UP, given, "h", block=int(change.get("block", 4))))  # type: ignore[call-overload]
    return graph


@pytest.mark.parametrize(
    ("change", "blocks", "says"),
    [
        ({}, [[0, 3]], "lies outside"),
        ({}, [[-1, 0]], "lies outside"),
        ({}, [[0], [1], [2]], "another number of tokens"),
        ({"block": 5}, [[0, 1]], "does not divide"),
        ({"scale": 1}, [[0, 1]], "scales are not"),
        ({"no_scale": 1}, [[0, 1]], "integer weights need scales"),
        ({"width": 1}, [[0, 1]], "different widths"),
    ],
)
def test_kernels_refuse_what_does_not_fit(change: dict[str, object], blocks: list[list[int]], says: str) -> None:
    session = native(gs.export_onnx(_bad(**change)))
    feeds = {"x": np.ones((2, 32), np.float32), "blocks": np.array(blocks, np.int32)}
    with pytest.raises(Exception, match=says):
        session.run(None, feeds)
