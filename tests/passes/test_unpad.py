"""unpad computes what the padded graph does for real tokens, and leaves alone what mixes tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import zoo
from positions import positional_graph
from rewrite import canonical, session
from seeds import seeded

from trimtab.passes import Capability, PassContext, PassResult, run_passes
from trimtab.passes.dynamic_int8 import DynamicInt8
from trimtab.passes.graph import save_graph
from trimtab.passes.unpad import Unpad

ENCODERS = ("bert", "roberta", "distilbert", "vit", "t5")
EVERY = [(family, exporter) for family in ENCODERS for exporter in ("dynamo", "torchscript")]


def unpadded(family: str, folder: Path, exporter: str = "dynamo") -> Path:
    graph = canonical(zoo.exported(family, exporter))
    outputs = [(tensor.name, tensor.dtype, tensor.shape) for tensor in graph.outputs]
    (result,) = run_passes(graph, [Unpad()], PassContext())
    assert result.changed > 0 and not result.left, result.left
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in graph.outputs] == outputs
    save_graph(graph, folder / "unpadded.onnx")
    return folder / "unpadded.onnx"


def refused(graph: gs.Graph) -> PassResult:
    """What the pass says of a graph that it leaves alone; which it has not changed."""
    before = [(node.op, [t.name for t in node.inputs]) for node in graph.nodes], graph.opset
    result = Unpad().run(graph, PassContext())
    assert result.changed == 0
    assert ([(node.op, [t.name for t in node.inputs]) for node in graph.nodes], graph.opset) == before
    return result


def assert_same(
    sessions: Sequence[ort.InferenceSession], feeds: dict[str, np.ndarray], rows: np.ndarray | None = None
) -> None:
    """All outputs are equal; those by token where tokens are real, those by sample for `rows`."""
    dense, ours = (run.run(None, {i.name: feeds[i.name] for i in run.get_inputs()}) for run in sessions)
    for a, b in zip(dense, ours, strict=True):
        assert a.shape == b.shape
        mask = feeds.get("attention_mask")
        by_token = mask is not None and a.shape[:2] == mask.shape
        chosen = mask != 0 if by_token else (np.ones(len(a), bool) if rows is None else rows)
        np.testing.assert_allclose(b[chosen], a[chosen], rtol=0, atol=2e-5 * max(1.0, np.abs(a).max(initial=0)))
        assert np.isfinite(b).all()


@pytest.mark.parametrize(("family", "exporter"), EVERY)
def test_exact(family: str, exporter: str, tmp_path: Path) -> None:
    rng = seeded()
    sessions = session(zoo.exported(family, exporter)), session(unpadded(family, tmp_path, exporter))
    for batch, tokens in [(1, 1), (1, 13), (5, 9), (4, 40)]:
        assert_same(sessions, zoo.feeds(family, batch, tokens, rng))
    feeds = zoo.feeds(family, 3, 17, rng)
    if "attention_mask" in feeds:
        feeds["attention_mask"][:] = 1
        assert_same(sessions, feeds)


@pytest.mark.parametrize("family", ["bert", "distilbert", "t5", "vit"])
def test_no_samples(family: str, tmp_path: Path) -> None:
    feeds = zoo.feeds(family, 1, 5, seeded())
    run = session(unpadded(family, tmp_path))
    (found,) = run.run(None, {i.name: feeds[i.name][:0] for i in run.get_inputs()})
    assert len(found) == 0


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_samples_without_real_tokens(family: str, tmp_path: Path) -> None:
    """They disturb nobody, even where there are no others, and are finite."""
    rng = seeded()
    sessions = session(zoo.exported(family)), session(unpadded(family, tmp_path))
    feeds = zoo.feeds(family, 4, 11, rng)
    for empty in ([1], [3], [0, 3], [0, 1, 2, 3]):
        feeds["attention_mask"] = (np.arange(11) < rng.integers(1, 12, (4, 1))).astype(np.int64)
        feeds["attention_mask"][empty] = 0
        assert_same(sessions, feeds, feeds["attention_mask"].any(axis=1))


def test_real_tokens_anywhere(tmp_path: Path) -> None:
    """A mask may have its zeros in front, and in between."""
    rng = seeded()
    sessions = session(zoo.exported("distilbert")), session(unpadded("distilbert", tmp_path))
    for _ in range(3):
        feeds = zoo.feeds("distilbert", 4, 12, rng)
        feeds["attention_mask"] = rng.integers(0, 2, (4, 12))
        assert_same(sessions, feeds)
        feeds["attention_mask"] = (np.arange(12) >= rng.integers(0, 12, (4, 1))).astype(np.int64)
        assert_same(sessions, feeds)


def test_biases_by_distance_take_padding_in_front(tmp_path: Path) -> None:
    rng = seeded()
    sessions = session(zoo.exported("t5")), session(unpadded("t5", tmp_path))
    feeds = zoo.feeds("t5", 4, 12, rng)
    feeds["attention_mask"] = feeds["attention_mask"][:, ::-1].copy()
    assert_same(sessions, feeds)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_reference_bodies_compute_the_same(family: str, tmp_path: Path) -> None:
    path = unpadded(family, tmp_path)
    plain = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert_same((session(zoo.exported(family)), plain), zoo.feeds(family, 3, 14, seeded()))


def test_padding_costs_nothing(tmp_path: Path) -> None:
    """Between the layers there are as many rows as real tokens."""
    graph = canonical(zoo.exported("bert"))
    run_passes(graph, [Unpad()], PassContext())
    contexts = [node.outputs[0] for node in graph.nodes if node.op == "PackedAttention"]
    graph.outputs += contexts
    save_graph(graph, tmp_path / "m.onnx")
    feeds = zoo.feeds("bert", 5, 30, seeded())
    run = session(tmp_path / "m.onnx")
    outputs = run.run([t.name for t in contexts], {i.name: feeds[i.name] for i in run.get_inputs()})
    assert [len(x) for x in outputs] == [feeds["attention_mask"].sum()] * 3


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma", "opt"])
def test_decoders_are_left_alone(family: str) -> None:
    (left,) = refused(canonical(zoo.exported(family))).left
    assert left.where == "attention 0" and "hidden by position" in left.why


def test_caches_are_left_alone() -> None:
    (left,) = refused(canonical(zoo.exported("llama", "cached"))).left
    assert "past_key_values" in left.why


@pytest.mark.parametrize("attrs", [{"op": "ReduceMax"}, {"op": "Softmax"}, {"op": "CumSum"}], ids=lambda a: a["op"])
def test_what_mixes_tokens_between_layers_is_named(attrs: dict[str, str]) -> None:
    """A node behind the first layer, whose result is added to the stream."""
    graph = canonical(zoo.exported("bert"))
    stream = [node for node in graph.nodes if node.op == "LayerNormalization"][2].outputs[0]
    readers = list(stream.outputs)
    mixed = gs.Variable("mixed", np.float32, stream.shape)
    axis = gs.Constant("mix/axis", np.array([1] if attrs["op"] == "ReduceMax" else 1, np.int64))
    inputs = [stream] if attrs["op"] == "Softmax" else [stream, axis]
    graph.nodes.append(gs.Node(attrs["op"], "mix", {"axis": 1} if attrs["op"] == "Softmax" else {}, inputs, [mixed]))
    total = gs.Variable("total", np.float32, stream.shape)
    graph.nodes.append(gs.Node("Add", "join", {}, [stream, mixed], [total]))
    for node in readers:
        node.inputs = [total if t is stream else t for t in node.inputs]
    graph.toposort()
    (left,) = refused(graph).left
    assert left.where == "mix" and attrs["op"] in left.why


@pytest.mark.parametrize("heads_apart", [False, True])
@pytest.mark.parametrize("mask", ["lengths", "raw"])
def test_attention_that_was_fused_is_named(heads_apart: bool, mask: str, tmp_path: Path) -> None:
    """By ONNX Runtime's optimizer of transformers, which hides biases and masks in one op."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions("bert")
    options.use_multi_head_attention, options.enable_embed_layer_norm = heads_apart, mask == "lengths"
    options.use_raw_attention_mask(mask == "raw")
    path = str(zoo.exported("bert", "torchscript"))
    fused = optimize_model(path, "bert", num_heads=4, hidden_size=48, optimization_options=options, opt_level=0)
    fused.save_model_to_file(str(tmp_path / "fused.onnx"))
    op = "MultiHeadAttention" if heads_apart else "Attention"
    (left,) = refused(canonical(tmp_path / "fused.onnx")).left
    assert f"fused as com.microsoft.{op}: use the exported file" in left.why


def test_before_dynamic_int8(tmp_path: Path) -> None:
    """All that remains of products is of integers: q, k and v in one, the attention's output, and the FFN's two."""
    graph = canonical(zoo.exported("bert"))
    results = run_passes(graph, [Unpad(), DynamicInt8()], PassContext())
    assert results[1].details["float_products"] == 0
    assert sum(node.op == "MatMulInteger" for node in graph.nodes) == 3 * 4 + 2  # and the head's
    save_graph(graph, tmp_path / "int8.onnx")
    feeds = zoo.feeds("bert", 4, 15, seeded())
    dense, ours = (
        run.run(None, {i.name: feeds[i.name] for i in run.get_inputs()})[0]
        for run in (session(zoo.exported("bert")), session(tmp_path / "int8.onnx"))
    )
    assert np.linalg.norm(ours - dense) < 0.1 * np.linalg.norm(dense)


def test_behind_dynamic_int8_it_leaves_all() -> None:
    graph = canonical(zoo.exported("bert"))
    run_passes(graph, [DynamicInt8()], PassContext())
    assert refused(graph).left


def test_a_target_that_counts_no_sizes() -> None:
    assert "counted at run time" in str(Unpad().unfit(Capability(counted_sizes=False)))
    assert Unpad().unfit(Capability()) is None


@pytest.mark.parametrize(("family", "tokens"), [("mpnet", 200), ("t5", 150)])
def test_biases_of_large_tables(family: str, tokens: int, tmp_path: Path) -> None:
    """Beyond the last bucket of distances, with tables as large as trained ones."""
    rng = seeded()
    graph = positional_graph(family)
    save_graph(graph, tmp_path / "dense.onnx")
    (result,) = run_passes(graph, [Unpad()], PassContext())
    assert result.changed == 2
    save_graph(graph, tmp_path / "ours.onnx")
    lengths = rng.integers(1, tokens + 1, (3, 1))
    ids = rng.integers(3, 140, (3, tokens))
    feeds = {"input_ids": ids, "attention_mask": (np.arange(tokens) < lengths).astype(np.int64)}
    assert_same((session(tmp_path / "dense.onnx"), session(tmp_path / "ours.onnx")), feeds)


def test_disentangled_attention_is_left_alone() -> None:
    (left,) = refused(positional_graph("deberta_v2")).left
    assert left.where == "attention 0" and "more than q and k" in left.why
