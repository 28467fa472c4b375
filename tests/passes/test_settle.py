"""Decoders as ONNX Runtime computes them best: fewer nodes, the same results."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import zoo
from rewrite import canonical
from seeds import seeded

from trimtab.compiler.targets import get_target
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner
from trimtab.passes import Capability, PassContext, pass_class, run_passes
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.graph import constant, insert, load_graph, save_graph
from trimtab.passes.graph.weights import Part
from trimtab.passes.settle import tighten_decoder
from trimtab.passes.settle.heads import drop_reshapes
from trimtab.passes.settle.joined import join_projections
from trimtab.passes.settle.rotation import fuse_rotation

ROTATED = ("llama", "gemma")
"""Whose heads have a size that the op rotates: a multiple of 16, and all of it is rotated."""
PASSES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "fp32": [],
    "int8": [("dynamic-int8", {"scales": "row"})],
    "int8-blocks": [("weight-only", {"bits": 8, "block": 16})],
    "int4-blocks": [("weight-only", {"bits": 4, "block": 16})],
}


def compiled(family: str, form: str) -> gs.Graph:
    graph = canonical(zoo.exported(family, "cached"))
    passes = [pass_class(name).model_validate(options) for name, options in PASSES[form]]
    run_passes(graph, passes, PassContext(capability=Capability(row_scales=True)))
    return graph


def settled(graph: gs.Graph, path: Path, most: int | None = zoo.TEXT) -> gs.Graph:
    """What the target makes of `graph`, and saves."""
    get_target("onnxruntime").settle(graph, most, 1)
    save_graph(graph, path)
    onnx.checker.check_model(path)
    return load_graph(path)


def steps_of(path: Path, rows: list[np.ndarray], prompts: list[int]) -> list[np.ndarray]:
    """Logits of each row's own tokens: of a batch of prompts of different lengths, and token by token behind."""
    steps, most = OnnxRuntimeRunner(path).steps(len(rows), max(map(len, rows))), max(prompts)
    ids = np.zeros((len(rows), most), np.int64)
    for row, tokens, prompt in zip(ids, rows, prompts, strict=True):
        row[:prompt] = tokens[:prompt]
    mask = (np.arange(most) < np.array(prompts)[:, None]).astype(np.int64)
    first = steps.run(ids, mask)
    found = [logits[:prompt].copy() for logits, prompt in zip(first, prompts, strict=True)]
    for step in range(min(len(row) - prompt for row, prompt in zip(rows, prompts, strict=True))):
        mask = np.concatenate([mask, np.ones((len(rows), 1), np.int64)], 1)
        tokens = np.array([[row[prompt + step]] for row, prompt in zip(rows, prompts, strict=True)])
        found += [logits.copy() for logits in steps.run(tokens, mask)]
    return found


@pytest.mark.parametrize("form", PASSES)
@pytest.mark.parametrize("family", zoo.DECODERS)
def test_computes_the_same(family: str, form: str, tmp_path: Path) -> None:
    rng = seeded()
    prompts = [4, 9, 1]
    rows = [rng.integers(3, 109, prompt + 5) for prompt in prompts]
    graph = compiled(family, form)
    save_graph(graph, tmp_path / "plain.onnx")
    plain = steps_of(tmp_path / "plain.onnx", rows, prompts)
    settled(graph, tmp_path / "settled.onnx")
    found = steps_of(tmp_path / "settled.onnx", rows, prompts)
    if not form.endswith("blocks"):
        for want, got in zip(plain, found, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
        return
    # Where a processor sums the last columns of a matrix in another order, some x are rounded to the next integer.
    save_graph(compiled(family, "fp32"), tmp_path / "dense.onnx")
    dense = steps_of(tmp_path / "dense.onnx", rows, prompts)
    apart, rounding = (
        sum(float(np.linalg.norm(a - b)) for a, b in zip(plain, others, strict=True)) for others in (found, dense)
    )
    assert apart <= 0.3 * rounding


@pytest.mark.parametrize("family", ROTATED)
def test_a_second_part_of_a_prompt_goes_on(family: str, tmp_path: Path) -> None:
    graph = compiled(family, "fp32")
    save_graph(graph, tmp_path / "plain.onnx")
    settled(graph, tmp_path / "settled.onnx")
    row = seeded().integers(3, 109, (1, zoo.TEXT))
    found = []
    for name in ("plain", "settled"):
        steps = OnnxRuntimeRunner(tmp_path / f"{name}.onnx").steps(1, zoo.TEXT)
        steps.run(row[:, :5], np.ones((1, 5), np.int64))
        found.append(steps.run(row[:, 5:], np.ones((1, zoo.TEXT), np.int64)))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-5 * np.abs(found[0]).max())


@pytest.mark.parametrize("form", PASSES)
@pytest.mark.parametrize("family", ROTATED)
def test_a_layer_is_few_nodes(family: str, form: str, tmp_path: Path) -> None:
    """The op rotates, and takes queries, keys and values side by side: none of what served the heads is left."""
    graph = settled(compiled(family, form), tmp_path / "model.onnx")
    ops = Counter(node.op for node in graph.nodes)
    layers = ops["GroupQueryAttention"]
    assert not ops["RotaryEmbedding"] and not ops["Cos"] and ops["Reshape"] <= 1 and ops["Transpose"] <= 1
    for node in graph.nodes:
        if node.op == "GroupQueryAttention":
            assert node.attrs["do_rotary"] == 1
            assert [bool(tensor.name) for tensor in node.inputs[:3]] == [True, False, False]
            assert node.inputs[7].shape[0] == node.inputs[8].shape[0] == zoo.TEXT
    assert layers == 2
    apart = (family, form) == ("gemma", "int8")  # whose gate has its GELU inside the product
    # projections, out, gate and up, down; and the head
    assert ops["MatMul"] + ops["Int8Linear"] == (5 if apart else 4) * layers + 1


@pytest.mark.parametrize("spoil", [None, "read thrice", "an output", "another block", "halves of one weight"])
def test_gate_and_up_are_one_product(spoil: str | None) -> None:
    graph = compiled("llama", "fp32" if spoil == "halves of one weight" else "int4-blocks")
    ffn = find_anatomy(graph).ffns[0]
    gate, up = ffn.gate, ffn.up
    assert gate is not None
    if spoil == "read thrice":
        graph.outputs.append(insert(graph, "Identity", [gate.x], "more", dtype=np.float32))
    elif spoil == "an output":
        up.y.dtype = np.dtype(np.float32)
        graph.outputs.append(up.y)
    elif spoil == "another block":
        up.quantized.attrs["block_size"] = 8
    elif spoil == "halves of one weight":
        whole = np.concatenate([gate.w(), up.w()], 1)
        for number, each in enumerate((gate, up)):
            size = each.out_features
            each.weight._values = Part(whole, 1, slice(number * size, (number + 1) * size))
    tighten_decoder(graph, zoo.TEXT)
    assert sum(node.op == "Split" for node in graph.nodes) == (2 if spoil is None else 1)


def test_packed_projections_stay_packed(tmp_path: Path) -> None:
    """GPT-2 has one product for all three, which was divided and put together again."""
    graph = settled(compiled("gpt2", "fp32"), tmp_path / "model.onnx")
    assert not [node for node in graph.nodes if node.op == "Split"]


def test_rotation_without_a_limit_stays_outside() -> None:
    graph = compiled("llama", "fp32")
    assert fuse_rotation(graph, None) == 0
    assert fuse_rotation(graph, 1 << 40) == 0, "tables would be too large"
    assert fuse_rotation(graph, zoo.TEXT) == 2
    assert fuse_rotation(graph, zoo.TEXT) == 0, "they rotate already"


def test_angles_of_more_than_positions_stay_outside() -> None:
    """As where long texts have other frequencies: which, is known when all positions are."""
    graph = compiled("llama", "fp32")
    (scaled,) = {id(t): t for n in graph.nodes if n.op == "Cos" for t in n.inputs}.values()
    node = scaled.inputs[0]
    largest = gs.Variable("largest", np.float32)
    graph.nodes.append(gs.Node("ReduceMax", inputs=[node.inputs[0]], outputs=[largest]))
    by = gs.Variable("by", np.float32, scaled.shape)
    graph.nodes.append(gs.Node("Div", inputs=[scaled, largest], outputs=[by]))
    for user in [user for user in scaled.outputs if user.op != "Div"]:
        user.inputs = [by]
    assert fuse_rotation(graph, zoo.TEXT) == 0


def test_queries_and_keys_of_other_angles_stay_outside() -> None:
    graph = compiled("llama", "fp32")
    attention = next(node for node in graph.nodes if node.op == "GroupQueryAttention")
    rotation = attention.inputs[1].inputs[0].inputs[0].inputs[0].inputs[0].inputs[0]
    assert rotation.op == "RotaryEmbedding"
    twice = gs.Variable("twice", np.float32, rotation.inputs[1].shape)
    graph.nodes.append(gs.Node("Mul", inputs=[rotation.inputs[1]] * 2, outputs=[twice]))
    rotation.inputs[1] = twice
    assert fuse_rotation(graph, zoo.TEXT) == 1


@pytest.mark.parametrize("spoil", [None, "another x", "used elsewhere", "no bias", "one bias for all", "another block"])
def test_products_that_differ_stay_apart(spoil: str | None) -> None:
    graph = compiled("llama", "int8-blocks")
    fuse_rotation(graph, zoo.TEXT)
    drop_reshapes(graph)
    attention = next(node for node in graph.nodes if node.op == "GroupQueryAttention")
    products = [tensor.inputs[0] for tensor in attention.inputs[:3]]
    for place, product in enumerate(products):
        if place == 1 and spoil == "no bias":
            continue
        size = 1 if spoil == "one bias for all" else product.inputs[1].inputs[0].inputs[0].shape[1]
        bias = np.ones(size, np.float32)
        attention.inputs[place] = insert(
            graph, "Add", [product.outputs[0], constant(f"b{place}", bias)], f"biased{place}"
        )
    key = products[1]
    if spoil == "another x":
        key.inputs[0] = insert(graph, "Identity", [key.inputs[0]], "other", dtype=np.float32)
    elif spoil == "used elsewhere":
        graph.outputs.append(insert(graph, "Identity", [attention.inputs[1]], "more", dtype=np.float32))
    elif spoil == "another block":
        key.inputs[1].inputs[0].attrs["block_size"] = 8
    nodes = len(graph.nodes)
    assert join_projections(graph) == (2 if spoil is None else 1)
    assert len(graph.nodes) < nodes, "what was begun in vain is gone"
