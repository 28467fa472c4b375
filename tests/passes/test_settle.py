"""Decoders as ONNX Runtime computes them best: fewer nodes, the same results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
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
from trimtab.passes.settle.glu import Glus
from trimtab.passes.settle.heads import drop_reshapes
from trimtab.passes.settle.joined import join_projections
from trimtab.passes.settle.rotation import fuse_rotation
from trimtab.plugins import GLU, add_node

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
    if form == "fp32":
        for want, got in zip(plain, found, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
        return
    # Where sums go in another order, or Glu's exponential has another last bit, some x are rounded to the next integer.
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


SPOILT = (
    "read again", "an output", "another activation", "a vector", "older opset", "integers", "a far bound",
    "one more axis", "compiled before",
)  # fmt: skip


@pytest.mark.parametrize("spoil", [None, *SPOILT])
def test_a_gate_and_its_product_are_one_op(spoil: str | None, tmp_path: Path) -> None:
    """Or stay what they were, where something else reads them, or the op cannot say what they do."""
    graph = compiled("llama", "fp32")
    ffn = find_anatomy(graph).ffns[0]
    act = ffn.activation
    product = act.output.inputs[0]
    if spoil == "read again":
        y = insert(graph, "Tanh", [act.inputs[0]], "more", dtype=np.float32)
        y.shape = ["batch", "tokens", ffn.d_ff]
        graph.outputs.append(y)
    elif spoil == "an output":
        (gated,) = [tensor for tensor in product.inputs if tensor is not act.inputs[1]]
        gated.dtype, gated.shape = np.dtype(np.float32), ["batch", "tokens", ffn.d_ff]
        graph.outputs.append(gated)
    elif spoil == "another activation":
        sigmoid = next(node for node in act.nodes if node.op == "Sigmoid")
        sigmoid.op = "Tanh"  # x tanh(x) is none that has a name
    elif spoil == "a vector":
        by = constant("by", np.linspace(1, 2, ffn.d_ff, dtype=np.float32))
        scaled = insert(graph, "Mul", [act.inputs[0], by], "scaled", dtype=np.float32)
        scaled.shape = ["batch", "tokens", ffn.d_ff]
        for node in act.nodes:
            node.inputs = [scaled if tensor is act.inputs[0] else tensor for tensor in node.inputs]
    elif spoil == "older opset":
        graph.opset = 17
    elif spoil in ("integers", "a far bound", "one more axis"):
        changed = _changed(graph, spoil, act.inputs[0])
        for node in act.nodes:
            node.inputs = [changed if tensor is act.inputs[0] else tensor for tensor in node.inputs]
    elif spoil == "compiled before":
        both = gs.Variable("both", np.float32, ["batch", "tokens", 8])
        graph.outputs.append(add_node(graph, GLU, {"x": both}, "other", activation="tanh"))
        graph.inputs.append(both)
    tighten_decoder(graph, zoo.TEXT, glu=True)
    glus = [node for node in graph.nodes if node.op == "Glu"]
    assert len(glus) == {None: 2, "older opset": 0}.get(spoil, 1)  # of the other layer; or the one that was there
    if spoil is None:
        assert [node.attrs["activation"] for node in glus] == ["silu", "silu"]
        assert not any(node.op in ("Split", "Sigmoid") for node in graph.nodes)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_the_op_is_of_float32(dtype: type) -> None:
    graph = compiled("llama", "fp32")
    parts = find_anatomy(graph).ffns[0].activation.inputs
    for part in parts:
        part.dtype = np.dtype(dtype)
    assert (Glus(graph, True).fits(parts) is not None) == (dtype is np.float32)


def _changed(graph: gs.Graph, how: str, x: gs.Tensor) -> gs.Variable:
    """What an activation that is looked at near 0 does not tell apart from x."""
    if how == "integers":
        y = insert(graph, "Cast", [x], "whole", attrs={"to": 6}, dtype=np.int32)
        y = insert(graph, "Cast", [y], "again", attrs={"to": 1}, dtype=np.float32)
    elif how == "a far bound":
        bounds = [constant(name, np.float32(value)) for name, value in (("low", -1e3), ("high", 1e3))]
        y = insert(graph, "Clip", [x, *bounds], "bounded", dtype=np.float32)
    else:
        y = insert(
            graph, "Add", [x, constant("nothing", np.zeros((1, 1, 1, 1), np.float32))], "wider", dtype=np.float32
        )
    y.shape = x.shape
    return y


def test_a_gate_that_is_the_second_half() -> None:
    graph = compiled("llama", "fp32")
    for ffn in find_anatomy(graph).ffns:
        assert ffn.gate is not None
        readers = ffn.x.outputs
        readers.sort(key=lambda node: node is ffn.gate.nodes[0])  # up in front
    save = [node.op for node in graph.nodes]
    tighten_decoder(graph, zoo.TEXT, glu=True)
    assert save.count("Mul") and {node.attrs["gate"] for node in graph.nodes if node.op == "Glu"} == {1}


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


def with_positions(move: Callable[[gs.Graph, gs.Tensor], gs.Tensor]) -> gs.Graph:
    """LLaMA whose positions are what `move` makes of the exporter's."""
    graph = compiled("llama", "fp32")
    (unsqueezed,) = {
        id(node): node for node in graph.nodes if node.op == "Unsqueeze" and node.inputs[0].dtype == np.int64
        and len(node.inputs[0].shape or ()) == 2
    }.values()  # fmt: skip
    positions = unsqueezed.inputs[0]
    readers = list(positions.outputs)
    moved = move(graph, positions)
    for node in readers:
        node.inputs = [moved if tensor is positions else tensor for tensor in node.inputs]
    return graph


def _given(graph: gs.Graph, positions: gs.Tensor) -> gs.Tensor:
    graph.inputs.append(gs.Variable("position_ids", np.int64, ["batch", "tokens"]))
    return graph.inputs[-1]


def _given_and_changed(graph: gs.Graph, positions: gs.Tensor) -> gs.Tensor:
    y = insert(graph, "Mul", [_given(graph, positions), constant("one", np.int64(1))], "given", dtype=np.int64)
    y.shape = ["batch", "tokens"]
    return y


def _offset(graph: gs.Graph, positions: gs.Tensor) -> gs.Tensor:
    y = insert(graph, "Add", [positions, constant("two", np.int64(2))], "offset", dtype=np.int64)
    y.shape = ["batch", "tokens"]
    return y


def _of_the_mask(graph: gs.Graph, positions: gs.Tensor) -> gs.Tensor:
    """cumsum - 1, without the past's part."""
    mask = next(tensor for tensor in graph.inputs if tensor.name == "attention_mask")
    ids = next(tensor for tensor in graph.inputs if tensor.name == "input_ids")
    counts = insert(graph, "CumSum", [mask, constant("axis", np.int64(1))], "counts", dtype=np.int64)
    places = insert(graph, "Sub", [counts, constant("first", np.int64(1))], "places", dtype=np.int64)
    shape = insert(graph, "Shape", [ids], "ids.shape", attrs={"start": 1, "end": 2}, dtype=np.int64)
    start = insert(graph, "Neg", [shape], "start", dtype=np.int64)
    last = constant("last", np.array([1 << 40]))
    y = insert(graph, "Slice", [places, start, last, constant("axes", np.array([1]))], "of.mask", dtype=np.int64)
    y.shape = ["batch", "tokens"]
    return y


@pytest.mark.parametrize(
    ("move", "fused"),
    [(lambda graph, positions: positions, 2), (_of_the_mask, 2), (_given, 0), (_given_and_changed, 0), (_offset, 0)],
)
def test_other_positions_than_those_of_a_text_stay_outside(
    move: Callable[[gs.Graph, gs.Tensor], gs.Tensor], fused: int
) -> None:
    """The op counts on from the first one of a call, whatever the others are."""
    assert fuse_rotation(with_positions(move), zoo.TEXT) == fused


def test_a_part_of_a_head_is_rotated_outside_where_the_op_cannot() -> None:
    for half, fused in ((4, 0), (8, 2)):
        graph = compiled("llama", "fp32")
        for node in graph.nodes:
            if node.op == "RotaryEmbedding":
                for tensor in node.inputs[1:3]:
                    tensor.shape = [*tensor.shape[:-1], half]
            if node.op == "Mul" and half == 4:
                node.inputs = [_first(tensor, half) for tensor in node.inputs]
        assert fuse_rotation(graph, zoo.TEXT) == fused


def _first(tensor: gs.Tensor, count: int) -> gs.Tensor:
    """A constant of frequencies, cut."""
    if isinstance(tensor, gs.Constant) and tensor.shape and tensor.shape[-1] == 8:
        return constant(f"{tensor.name}.cut", np.asarray(tensor.values)[..., :count].copy())
    return tensor


def test_angles_that_mix_positions_stay_outside() -> None:
    """Made by the same ops: each cosine is the next position's."""
    graph = compiled("llama", "fp32")
    cut = {"later": (1, 1 << 40, 1), "first": (0, 1, 1)}
    ends = {name: [constant(f"{name}.{end}", np.array([end])) for end in each] for name, each in cut.items()}
    for number, cosine in enumerate([node for node in graph.nodes if node.op == "Cos"]):
        x = cosine.inputs[0]
        assert len(x.shape) == 3 and isinstance(x.shape[1], str)
        later, first = (insert(graph, "Slice", [x, *ends[name]], f"{name}{number}") for name in cut)
        turned = insert(graph, "Concat", [later, first], f"turned{number}", attrs={"axis": 1}, dtype=np.float32)
        for tensor in (later, first, turned):
            tensor.dtype, tensor.shape = np.dtype(np.float32), x.shape
        cosine.inputs = [turned]
    assert fuse_rotation(graph, zoo.TEXT) == 0


def test_weights_that_layers_share_are_joined_once(tmp_path: Path) -> None:
    graph = compiled("llama", "fp32")
    first, second = find_anatomy(graph).ffns
    for one, other in zip(first.linears, second.linears, strict=True):
        for node in list(other.weight.outputs):
            node.inputs = [one.weight if tensor is other.weight else tensor for tensor in node.inputs]
    save_graph(graph, tmp_path / "plain.onnx")
    graph = settled(graph, tmp_path / "settled.onnx")
    products = [node.inputs[0].inputs[0] for node in graph.nodes if node.op in ("Split", "Glu")]
    assert len(products) == 2
    assert products[0].inputs[1] is products[1].inputs[1]
    prompt = [seeded().integers(3, 109, 12)]
    for want, got in zip(
        *(steps_of(tmp_path / f"{name}.onnx", prompt, [7]) for name in ("plain", "settled")), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("other", ["a vector", "the same node twice"])
def test_what_is_no_pair_of_projections_stays(other: str, tmp_path: Path) -> None:
    rng, graph = seeded(), compiled("llama", "fp32")
    x = next(node for node in graph.nodes if node.op == "GroupQueryAttention").outputs[0]
    x = insert(graph, "Identity", [x], "x", dtype=np.float32)
    x.shape = ["batch", "tokens", 64]
    if other == "a vector":
        rows = insert(graph, "Reshape", [x, constant("four", np.array([-1, 4, 64]))], "rows", dtype=np.float32)
        made = [
            insert(graph, "MatMul", [rows, constant(f"v{i}", rng.standard_normal(64).astype(np.float32))], f"p{i}")
            for i in range(2)
        ]
        rows.shape = ["n", 4, 64]
        for y in made:
            y.dtype, y.shape = np.dtype(np.float32), ["n", 4]
        end = insert(graph, "Sub", made, "difference", dtype=np.float32)
        end.shape = ["n", 4]
    else:
        square = insert(graph, "Reshape", [x, constant("square", np.array([-1, 8, 8]))], "squares", dtype=np.float32)
        square.shape = ["n", 8, 8]
        end = insert(graph, "MatMul", [square, square], "squared", dtype=np.float32)
        end.shape = ["n", 8, 8]
    graph.outputs.append(end)
    before = sum(node.op == "MatMul" for node in graph.nodes)
    settled(graph, tmp_path / "model.onnx")
    assert before - sum(node.op == "MatMul" for node in graph.nodes) == 2 * 2 + 2  # q, k, v and gate, up of two layers
    OnnxRuntimeRunner(tmp_path / "model.onnx")


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
