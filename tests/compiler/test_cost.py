"""Multiply-adds as they are executed: of dense models by their sizes, of pruned ones by what was left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import zoo
from packed_encoder import Encoder

from trimtab.compiler.checks.cost import Counter
from trimtab.passes import PassContext, run_passes
from trimtab.passes.errors import ModelError
from trimtab.passes.graph import constant, load_graph, save_graph
from trimtab.passes.token_prune import TokenPrune
from trimtab.plugins import OPS, add_node

SEED = int(np.random.default_rng().integers(1 << 30))


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 11), (0, 5)])
def test_a_dense_model_costs_what_its_sizes_say(batch: int, tokens: int) -> None:
    feeds = zoo.feeds("bert", batch, tokens, np.random.default_rng(SEED))
    layers, width, d_ff, classes = 3, 48, 80, 3
    of_token = 4 * width * width + 2 * width * d_ff + 2 * tokens * width  # projections, FFN, attention
    wanted = 2 * batch * (layers * tokens * of_token + width * width + width * classes)
    found = Counter(zoo.exported("bert"))(feeds)
    assert found.flops == wanted and found.passages == ()


def test_a_pruned_model_costs_what_is_left(tmp_path: Path) -> None:
    print(f"seed {SEED}")
    encoder = Encoder(SEED)
    graph = encoder.graph()
    run_passes(graph, [TokenPrune(keep=(0.5,))], PassContext())
    save_graph(graph, tmp_path / "model.onnx")
    count, lengths, width = Counter(tmp_path / "model.onnx"), np.array([8, 3, 16], np.int32), encoder.width
    x = encoder.rng.standard_normal((lengths.sum(), width)).astype(np.float32)
    for prune, share in ((0.0, 1.0), (1.0, 0.5)):
        found = count({"lengths": lengths, "x": x, "prune": np.full(3, prune, np.float32)})
        wanted, now, passages = 0, lengths.astype(int), []
        for _ in range(encoder.layers):
            kept = np.maximum(np.minimum(2, now), np.ceil(share * now)).astype(int)
            wanted += now.sum() * 3 * width * width + 2 * width * (now**2).sum()
            wanted += kept.sum() * (width * width + 4 * width * width)
            passages.append(("tokens", now.sum(), kept.sum()))
            now = kept
        wanted += 3 * (width * width + width * encoder.classes)
        assert found.flops == 2 * wanted
        assert [(p.what, p.entered, p.stayed) for p in found.passages] == passages
        twice = found + found
        assert twice.flops == 2 * found.flops and twice.passages[0].entered == 2 * lengths.sum()


@pytest.mark.parametrize(("batch", "tokens", "past"), [(1, 1, 7), (3, 5, 0)])
def test_a_decoder_costs_what_its_sizes_say(batch: int, tokens: int, past: int) -> None:
    path = zoo.exported("llama", "cached")
    graph = load_graph(path)
    attentions = [node for node in graph.nodes if node.op == "GroupQueryAttention"]
    products = sum(node.inputs[1].values.size for node in graph.nodes if node.op == "MatMul")
    sizes = {"input_ids": tokens, "attention_mask": past + tokens}
    feeds: dict[str, np.ndarray] = {name: np.ones((batch, size), np.int64) for name, size in sizes.items()}
    for tensor in graph.inputs:
        if tensor.name.startswith("past"):
            _, heads, _, width = tensor.shape
            feeds[tensor.name] = np.zeros((batch, heads, past, width), np.float32)
    of_keys = sum(int(node.attrs["num_heads"]) * width for node in attentions)
    found = Counter(path)({tensor.name: feeds[tensor.name] for tensor in graph.inputs})
    assert found.flops == 2 * batch * tokens * (products + 2 * of_keys * (past + tokens))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("tokens", "own"), [(0, False), (5, False), (5, True), (1, True)])
def test_neurons_of_a_variable_number_are_counted(gated: bool, tokens: int, own: bool, tmp_path: Path) -> None:
    print(f"seed {SEED}")
    rng, width, groups, block = np.random.default_rng(SEED), 12, 10, 4
    x, scores = (gs.Variable(name, np.float32, ["tokens", size]) for name, size in (("x", width), ("scores", groups)))
    graph = gs.Graph(inputs=[x, scores], opset=21, ir_version=10)
    blocks = add_node(graph, OPS["SelectBlocks"], {"scores": scores}, "b", k=groups, shared=int(not own), at_most=1)
    shared = {"block": block, "at_most": 1}
    matrices = {
        name: constant(name, rng.standard_normal((groups * block, width)).astype(np.float32))
        for name in ("up", "gate", "down")
    }
    up = {name: matrices[name] for name in (("up", "gate") if gated else ("up",))}
    h = add_node(graph, OPS["SparseUp"], {"x": x, "blocks": blocks, **up}, "h", activation="relu", **shared)
    given = {"h": h, "blocks": blocks, "down": matrices["down"]}
    graph.outputs = [add_node(graph, OPS["SparseDown"], given, "y", **shared)]
    save_graph(graph, tmp_path / "model.onnx")
    above = rng.standard_normal((tokens, groups)).astype(np.float32)
    found = Counter(tmp_path / "model.onnx")({"x": np.ones((tokens, width), np.float32), "scores": above})
    union = np.broadcast_to(above.max(0, initial=-1, keepdims=True), above.shape)
    chosen = np.maximum(((above if own else union) >= 0).sum(1), 1).sum()
    assert found.flops == 2 * chosen * block * width * (3 if gated else 2)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [0, 5])
def test_chosen_neurons_are_counted(gated: bool, tokens: int, tmp_path: Path) -> None:
    rng, width, neurons, block, rows = np.random.default_rng(SEED), 12, 40, 4, [1, 7, 8]

    def matrix(name: str, *size: int) -> gs.Constant:
        return constant(name, rng.standard_normal(size).astype(np.float32))

    x = gs.Variable("x", np.float32, ["tokens", width])
    graph = gs.Graph(inputs=[x], opset=21, ir_version=10)
    blocks = {"blocks": constant("blocks", np.array([rows], np.int32))}
    up = {"up": matrix("up", neurons, width)} | ({"gate": matrix("gate", neurons, width)} if gated else {})
    h = add_node(graph, OPS["SparseUp"], {"x": x, **blocks, **up}, "h", block=block, activation="relu")
    y = add_node(graph, OPS["SparseDown"], {"h": h, **blocks, "down": matrix("down", neurons, width)}, "y", block=block)
    graph.outputs = [add_node(graph, OPS["SparseHead"], {"x": y, **blocks, "weight": matrix("head", 90, width)}, "z")]
    save_graph(graph, tmp_path / "model.onnx")
    found = Counter(tmp_path / "model.onnx")({"x": np.ones((tokens, width), np.float32)})
    assert found.flops == 2 * tokens * width * ((3 if gated else 2) * block * len(rows) + len(rows))


def test_products_that_are_not_known_are_named(tmp_path: Path) -> None:
    x, y = gs.Variable("x", np.float32, [2, 3]), gs.Variable("y", np.float32, [2, 2])
    node = gs.Node("Einsum", "e", {"equation": "ij,kj->ik"}, [x, x], [y])
    save_graph(gs.Graph([node], [x], [y], opset=21, ir_version=10), tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="e: the multiply-adds of Einsum are not known"):
        Counter(tmp_path / "model.onnx")
