"""Graphs made ready for TensorRT: nodes of plugins, bodies that go, nodes that stay, and the same numbers."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from counting import COUNTING
from dialects import FORMATS, close, finish, graph_of, some_blocks, weights
from plugged import back, run
from seeds import seeded

from trimtab.compiler.targets.tensorrt.prepare import prepare as prepare_files
from trimtab.compiler.targets.tensorrt.sizes import sizes_at
from trimtab.compiler.targets.tensorrt.target import TensorRTRTX
from trimtab.compiler.workload import Workload
from trimtab.plugins import (
    DOMAIN,
    KEEP_TOKENS,
    OPS,
    SELECT_BLOCKS,
    SPARSE_DOWN,
    SPARSE_HEAD,
    SPARSE_UP,
    add_multi_output_node,
    add_node,
)
from trimtab.plugins.dialect import Form
from trimtab.plugins.gpu.compile import compile_kernel
from trimtab.plugins.gpu.ptx import assemble
from trimtab.plugins.sparse_up.keep import KEEP_LARGEST
from trimtab.plugins.tensorrt import PLUGINS, Plugin, Prepared, kernels, missing, plugins_of, prepare
from trimtab.plugins.tensorrt.prepare import split_keep

pytest.importorskip("triton", reason="the kernels need the package triton")
WIDTH, BLOCK, COUNT = 64, 4, 12
NEURONS = BLOCK * COUNT


def ffn(
    rng: np.random.Generator, form: str = "float32", keep: int = 0, kind: type = np.float32, layers: int = 1
) -> gs.Graph:
    """Gated FFNs, one after the other, that choose 6 of 12 blocks by their input, and in the end a head."""
    graph = graph_of(x=(kind, ["batch", "tokens", WIDTH]), rows=(np.int32, [1, "candidates"]))
    x, rows = graph.inputs
    for layer in range(layers):
        name = f"layer.{layer}"
        scores = gs.Variable(f"{name}/scores", kind, ["batch", "tokens", COUNT])
        predictor = gs.Constant(f"{name}/predictor", rng.standard_normal((WIDTH, COUNT)).astype(kind))
        graph.nodes.append(gs.Node("MatMul", f"{name}/predict", inputs=[x, predictor], outputs=[scores]))
        blocks = add_node(graph, SELECT_BLOCKS, {"scores": scores}, f"{name}/blocks", k=6, dense_above=5)
        parts: dict[str, gs.Tensor] = {"x": x, "blocks": blocks}
        for label in ("up", "gate", "down"):
            made, _ = weights(label, NEURONS, WIDTH, form, rng)
            for key, tensor in made.items():
                tensor.name = f"{name}/{key}"
            parts |= made
        downs = {key: parts.pop(key) for key in list(parts) if key.startswith("down")}
        parts["gate_bias"] = gs.Constant(f"{name}/bias", rng.standard_normal(NEURONS).astype(np.float32))
        parts["importance"] = gs.Constant(f"{name}/importance", rng.random(NEURONS).astype(np.float32))
        h = add_node(graph, SPARSE_UP, parts, f"{name}/h", activation="silu", block=BLOCK, keep=keep)
        y = add_node(graph, SPARSE_DOWN, {"h": h, "blocks": blocks} | downs, f"{name}/y", block=BLOCK)
        x = gs.Variable(f"{name}/out", kind, ["batch", "tokens", WIDTH])
        size = gs.Constant(f"{name}/size", np.array(1 / WIDTH**2, kind))
        graph.nodes.append(gs.Node("Mul", f"{name}/scale", inputs=[y, size], outputs=[x]))
    head, _ = weights("weight", 30, WIDTH, form, rng)
    logits = add_node(graph, SPARSE_HEAD, {"x": x, "blocks": rows} | head, "logits")
    graph.outputs = [logits]
    return graph


def feeds(rng: np.random.Generator, tokens: int, kind: type = np.float32) -> dict[str, np.ndarray]:
    return {"x": rng.standard_normal((2, tokens, WIDTH)).astype(kind), "rows": some_blocks(1, 30, 9, rng)}


@pytest.mark.parametrize("keep", [0, 3])
@pytest.mark.parametrize("form", ["float32", "float16", "bfloat16", "int8"])
def test_nodes_become_those_of_plugins(form: str, keep: int) -> None:
    rng = seeded()
    graph = ffn(rng, form, keep, layers=2)
    before = finish(graph, *graph.outputs)
    prepared = prepare(graph)
    scales = "_up_scale_gate_gate_scale" if form == "int8" else "_gate"
    assert prepared.left == {}
    assert set(prepared.plugins) == {
        "SelectBlocksPlugin",
        f"SparseUpPlugin{scales}_gate_bias",
        "SparseDownPlugin_down_scale" if form == "int8" else "SparseDownPlugin",
        "SparseHeadPlugin_weight_scale" if form == "int8" else "SparseHeadPlugin",
    }
    model = finish(graph, *graph.outputs)
    assert plugins_of(model) == prepared.plugins
    assert [f.name for f in model.functions] == (["KeepLargest"] if keep else [])
    assert not any("" in node.input for node in model.graph.node if node.domain == DOMAIN), "no input is left out"
    again = gs.import_onnx(model)
    back(again)
    after = finish(again, *again.outputs)
    for tokens in (1, 2, 3):  # below and above what takes all blocks
        given = feeds(rng, tokens)
        close(run(after, given), run(before, given), form, float(np.abs(run(before, given)).max()))


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("form", FORMATS)
def test_keep_is_an_op_of_its_own(form: str, kind: type) -> None:
    """All activations and then the largest are what SparseUp keeps; in half precision they are rounded in between."""
    rng = seeded()
    keep = int(rng.integers(1, 9))
    graph = ffn(rng, form, keep, kind)
    up = next(node for node in graph.nodes if node.op == "SparseUp")
    graph.outputs = [up.outputs[0]]
    model = gs.export_onnx(graph)
    given = feeds(rng, 4, kind)
    wanted = run(model, given).astype(np.float64)
    split_keep(graph)
    nodes = {node.op: node for node in graph.nodes if node.domain == DOMAIN}
    assert nodes["SparseUp"].attrs["keep"] == 0 and nodes["KeepLargest"].attrs == {"block": BLOCK, "keep": keep}
    assert len([t for t in nodes["SparseUp"].inputs if not t.is_empty()]) < 9
    found = run(gs.export_onnx(graph), given).astype(np.float64)
    if kind is np.float32:
        close(found, wanted, form, float(np.abs(wanted).max()))
        assert ((found == 0) == (wanted == 0)).all()
    else:
        same = ((found == 0) == (wanted == 0)).all(-1)
        assert same.mean() >= 0.7, "ties after rounding are rare"
        np.testing.assert_array_equal(found[same], wanted[same])
    blocks = (found.reshape(*found.shape[:-1], -1, BLOCK) != 0).any(-1).sum(-1)
    assert (blocks <= keep).all() and blocks.max() == min(keep, blocks.max())


def test_tensorrts_parser_takes_keep(tmp_path: Path) -> None:
    """As TensorRT-RTX has it, whose parser works without a GPU."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    graph = graph_of(h=(np.float16, ["tokens", 6 * BLOCK]), blocks=(np.int32, ["selections", 6]))
    given = dict(zip(("h", "blocks"), graph.inputs, strict=True))
    given["importance"] = gs.Constant("importance", np.ones(NEURONS, np.float32))
    onnx.save(finish(graph, add_node(graph, KEEP_LARGEST, given, "y", block=BLOCK, keep=2)), tmp_path / "model.onnx")
    assert TensorRTRTX().parse([tmp_path / "model.onnx"]) == [[]]


def test_without_keep_its_importance_goes() -> None:
    graph = ffn(seeded())
    split_keep(graph)
    assert not any(node.op == "KeepLargest" for node in graph.nodes)
    assert all(tensor.name != "layer.0/importance" for node in graph.nodes for tensor in node.inputs)


def test_int4_stays_standard_ops() -> None:
    rng = seeded()
    graph = ffn(rng, "int4", keep=2)
    before = finish(graph, *graph.outputs)
    prepared = prepare(graph)
    assert prepared.plugins == ("SelectBlocksPlugin",)
    assert set(prepared.left) == {"layer.0/h", "layer.0/y", "logits"}
    assert all("int4" in reason for reason in prepared.left.values())
    model = finish(graph, *graph.outputs)
    assert {f.name for f in model.functions} == {"SparseUp", "SparseDown", "SparseHead", "KeepLargest"}
    again = gs.import_onnx(model)
    back(again)
    given = feeds(rng, 3)
    close(run(gs.export_onnx(again), given), run(before, given), "int4")


def test_outputs_that_a_node_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an op for tests: its plugin lacks them, and its node does not name the sizes that the kernel counts."""
    from counting_gpu import KERNEL

    module = import_module("trimtab.plugins.tensorrt.prepare")
    monkeypatch.setattr(module, "has_kernel", lambda op: True)
    monkeypatch.setattr(module, "kernel_of", lambda op: KERNEL)
    monkeypatch.setitem(OPS, COUNTING.name, COUNTING)
    for named in (("values",), ("values", "places")):
        plugin = Plugin(COUNTING, ("x",), named)
        monkeypatch.setitem(PLUGINS, plugin.name, plugin)
    graph = graph_of(x=(np.float32, ["n"]))
    one = add_node(graph, COUNTING, {"x": graph.inputs[0]}, "one")
    _, places = add_multi_output_node(graph, COUNTING, {"x": one}, "other", ("values", "places"))
    graph.outputs = [one, places]
    assert prepare(graph) == Prepared(("CountingPlugin", "CountingPlugin_places"), {})
    outputs = {node.op: [t.name for t in node.outputs] for node in graph.nodes}
    assert outputs == {"CountingPlugin": ["one"], "CountingPlugin_places": ["other/values", "other/places"]}
    assert not graph.functions


def test_an_op_without_a_kernel_stays() -> None:
    graph = graph_of(importance=(np.float32, ["n"]), offsets=(np.int32, ["b"]), threshold=(np.float32, [1]))
    given = dict(zip(("importance", "offsets", "threshold"), graph.inputs, strict=True))
    graph.outputs = [*add_multi_output_node(graph, KEEP_TOKENS, given, "keep")]
    assert prepare(graph) == Prepared((), {"keep": "the op has no kernel for GPUs"})
    assert [f.name for f in graph.functions] == ["KeepTokens"]


def test_what_kernels_do_not_hold_stays() -> None:
    graph = graph_of(scores=(np.float32, [1, 11008]), others=(np.float32, [1, "n"]), few=(np.float32, [1, 48]))
    outputs = [add_node(graph, SELECT_BLOCKS, {"scores": t}, f"{t.name}/b", k=3, shards=4) for t in graph.inputs]
    graph.outputs = outputs
    prepared = prepare(graph)
    assert prepared.plugins == ("SelectBlocksPlugin",)
    assert "11008 scores in 4 shards are more" in prepared.left["scores/b"]
    assert "not known before" in prepared.left["others/b"]
    model = finish(graph, *outputs)
    assert [n.op_type for n in model.graph.node] == ["SelectBlocks", "SelectBlocks", "SelectBlocksPlugin"]
    assert [f.name for f in model.functions] == ["SelectBlocks"], "the nodes that stay need it"


def test_within_branches() -> None:
    """Nodes of subgraphs are nodes too, and the model that is read again tells their plugins."""
    graph = graph_of(scores=(np.float32, [2, 12]), which=(bool, []))
    scores, which = graph.inputs
    branches = []
    for k in (2, 3):
        inner = gs.Graph(opset=graph.opset, functions=graph.functions, import_domains=graph.import_domains)
        inner.outputs = [add_node(inner, SELECT_BLOCKS, {"scores": scores}, f"b{k}", k=k, shared=1)]
        branches.append(inner)
    graph.functions = branches[0].functions
    out = gs.Variable("out", np.int32, [1, "k"])
    attrs = {"then_branch": branches[0], "else_branch": branches[1]}
    graph.nodes.append(gs.Node("If", "if", attrs, [which], [out]))
    graph.outputs = [out]
    assert prepare(graph) == Prepared(("SelectBlocksPlugin",), {})
    assert plugins_of(gs.export_onnx(graph)) == ("SelectBlocksPlugin",)


@pytest.mark.parametrize("form", ["float16", "int4"])
def test_what_the_builder_gets(form: str, tmp_path: Path) -> None:
    """The target's files have plugins, and no body, since what stays is lowered."""
    graph = ffn(seeded(), form, keep=2)
    model = finish(graph, *graph.outputs)
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "out").mkdir()
    workload = Workload(batch=(1, 1, 2), tokens=(1, 2, 4), dims={"candidates": (9, 9, 9)})
    made = prepare_files(tmp_path / "model.onnx", workload, tmp_path / "out", plugins=True, segments=1)
    assert made.plugins
    (path,) = made.models
    written = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(str(path))
    assert not written.functions
    if form == "float16":
        assert len(plugins_of(written)) == 4
    else:
        assert plugins_of(written) == ("SelectBlocksPlugin",)


def test_graphs_without_the_dialect_stay_as_they_are() -> None:
    graph = graph_of(x=(np.float32, [2]))
    y = gs.Variable("y", np.float32, [2])
    graph.nodes.append(gs.Node("Relu", inputs=[graph.inputs[0]], outputs=[y]))
    assert prepare(graph) == Prepared((), {})
    assert plugins_of(finish(graph, y)) == ()


def test_names_tell_plugins_apart() -> None:
    assert len({name.lower() for name in PLUGINS}) == len(PLUGINS)
    assert all(plugin.name == name and "." not in name for name, plugin in PLUGINS.items())
    assert not any(onnx.defs.has(name) for name in PLUGINS)


@pytest.mark.parametrize(("newest", "version"), [("12.8", "8.7"), ("13.0", "9.0"), ("99.0", None), (None, None)])
def test_code_is_for_the_driver(newest: str | None, version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What assembles the code of an engine is the driver, which takes no PTX that is newer than itself."""
    monkeypatch.setattr(kernels, "cuda_version", lambda: newest)
    monkeypatch.setattr(kernels, "_compiled_kernels", {})
    kernel = kernels.kernel_of(SPARSE_DOWN)
    form = Form(
        {"h": "tensor(float16)", "blocks": "tensor(int32)", "down": "tensor(float16)"}, {"block": 1, "at_most": 0}
    )
    shapes = {"h": [-1, -1], "blocks": [1, -1], "down": [64, 32]}
    made = kernels.compiled(kernel, form, shapes, kernel.tiles(form, shapes)[0], 120)
    if version is not None:
        assert f".version {version}\n" in made.ptx
    else:
        assert made.ptx == compile_kernel(kernel, form, shapes, kernel.tiles(form, shapes)[0], 120).ptx
    assert assemble(made.ptx, 120).registers > 0


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tensorrt" else find(name))
    assert 'not installed; pip install "trimtab[tensorrt]"' in (missing() or "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "triton" else find(name))
    with pytest.raises(RuntimeError, match="need the package triton"):
        prepare(ffn(seeded()))


def test_sizes_behind_plugins_are_told() -> None:
    """By the ops' own rules, which ONNX's shape inference does not ask: a model is cut only where sizes are known."""
    graph = graph_of(scores=(np.float32, ["batch", "tokens", 12]), x=(np.float32, ["batch", "tokens", 8]))
    scores, x = graph.inputs
    blocks = add_node(graph, SELECT_BLOCKS, {"scores": scores}, "b", k=3, dense_above=4)
    w = gs.Constant("w", np.ones((24, 8), np.float32))
    h = add_node(graph, SPARSE_UP, {"x": x, "blocks": blocks, "up": w}, "h", block=2)
    y = gs.Variable("y", np.float32)
    graph.nodes.append(gs.Node("Relu", inputs=[h], outputs=[y]))
    graph.outputs = [y, h]
    assert len(prepare(graph).plugins) == 2
    for batch, tokens, neurons in ((1, 3, 6), (2, 5, 24)):
        sizes = sizes_at(graph, {"scores": [batch, tokens, 12], "x": [batch, tokens, 8]})
        assert sizes["h"] == sizes["y"] == (batch, tokens, neurons)
