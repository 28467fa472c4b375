"""Lowered graphs compute what the graphs did, in standard ops alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from choices import clearness
from rewrite import canonical, head_profile, session
from seeds import seeded
from zoo import exported, feeds, tiny_model

from trimtab.compiler.decoder_cache import step_feeds
from trimtab.passes import PassContext, pass_class, run_passes
from trimtab.passes.errors import ModelError
from trimtab.passes.graph import load_graph, save_graph
from trimtab.passes.lower import lower
from trimtab.plugins import DOMAIN

STANDARD = ("", "ai.onnx")


def lowered(path: Path, folder: Path, **options: Any) -> tuple[Path, dict[str, int]]:
    """The lowered form of an ONNX file, and what was done."""
    graph = load_graph(path)
    done = lower(graph, **options)
    folder.mkdir(exist_ok=True)
    save_graph(graph, folder / "lowered.onnx")
    return folder / "lowered.onnx", done


def assert_standard(path: Path) -> None:
    model = onnx.load(str(path), load_external_data=False)
    assert {node.domain for node in model.graph.node} <= set(STANDARD) and not model.functions


def compiled(family: str, passes: dict[str, dict[str, Any]], folder: Path) -> Path:
    graph = canonical(exported(family))
    context = PassContext(head_profile(graph) if "head-topk" in passes else _profile(graph))
    run_passes(graph, [pass_class(name).model_validate(options) for name, options in passes.items()], context)
    folder.mkdir(exist_ok=True)
    save_graph(graph, folder / "model.onnx")
    return folder / "model.onnx"


def _profile(graph: Any) -> Any:
    from rewrite import profile_of

    return profile_of(graph)


def assert_same(before: Path, after: Path, family: str, atol: float, shapes: list[tuple[int, int]]) -> None:
    """Relative to the largest output of many inputs, for some by which no choice hangs on rounding."""
    rng, clear = seeded(), clearness(before)
    one, two = session(before), session(after)
    sizes = [np.abs(output).max() for output in one.run(None, feeds(family, 24, 5, rng))]
    for batch, tokens in shapes:
        given = feeds(family, batch, tokens, rng)
        while clear(given) < 10 * atol:
            given = feeds(family, batch, tokens, rng)
        for want, got, size in zip(one.run(None, given), two.run(None, given), sizes, strict=True):
            assert np.abs(got - want).max() <= atol * size


TOPK: dict[str, Any] = {"density": 0.2, "take": 0.3, "recall": 0.01}


@pytest.mark.parametrize("family", ["bert", "llama", "opt"])
@pytest.mark.parametrize("dense_above", [0, 4, 1000])
def test_chosen_neurons(tmp_path: Path, family: str, dense_above: int) -> None:
    model = compiled(family, {"ffn-topk": TOPK | {"dense_above": dense_above}}, tmp_path / "a")
    found, done = lowered(model, tmp_path / "b")
    assert done["SelectBlocks"] == done["SparseUp"] == done["SparseDown"] > 0
    assert_standard(found)
    assert_same(model, found, family, 2e-5, [(1, 3), (2, 2), (3, 7)])


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "int8", "block": 4, "exact": True},
        {"weights": "int8", "shared": True},
        {"weights": "int4", "block": 2},
        {"density": 1, "take": 1, "weights": "int8"},
        {"predictor": "copy", "common": 0.05, "signal": "both"},
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()),
)
def test_forms_of_weights_and_choices(tmp_path: Path, options: dict[str, Any]) -> None:
    model = compiled("llama", {"ffn-topk": TOPK | {"dense_above": 5} | options}, tmp_path / "a")
    found, _ = lowered(model, tmp_path / "b")
    assert_standard(found)
    # The native kernels round what they multiply integers with to 16 bits.
    assert_same(model, found, "llama", 3e-4, [(1, 3), (3, 4)])


def test_a_head_that_chooses_its_rows(tmp_path: Path) -> None:
    model = compiled("llama", {"head-topk": {"take": 16, "most": 1.0, "dense_above": 3}}, tmp_path / "a")
    found, done = lowered(model, tmp_path / "b")
    assert done == {"SelectBlocks": 1, "SparseHead": 1}
    assert_standard(found)
    assert_same(model, found, "llama", 2e-5, [(1, 2), (2, 5)])


def test_known_sizes_leave_one_form(tmp_path: Path) -> None:
    """Where the workload decides between the sparse and the dense form, the other one is not in the graph."""
    model = compiled("bert", {"ffn-topk": TOPK | {"dense_above": 8}}, tmp_path / "a")
    ops = {}
    for name, tokens in {"few": (1, 8), "many": (9, 64), "both": (1, 64)}.items():
        found, _ = lowered(model, tmp_path / name, tokens=tokens)
        ops[name] = [node.op_type for node in onnx.load(str(found), load_external_data=False).graph.node]
    assert "TopK" in ops["few"] and "TopK" in ops["both"] and "TopK" not in ops["many"]
    assert len(ops["both"]) > len(ops["few"])
    assert_same(model, tmp_path / "few" / "lowered.onnx", "bert", 2e-5, [(1, 8), (2, 4)])
    assert_same(model, tmp_path / "many" / "lowered.onnx", "bert", 2e-5, [(3, 3), (4, 16)])


def test_what_keeps_the_largest_apart_from_what_computes_them(tmp_path: Path) -> None:
    """KeepLargest stands behind SparseUp where one launch cannot look at a whole token."""
    from trimtab.plugins.tensorrt.prepare import split_keep

    model = compiled("llama", {"ffn-topk": TOPK | {"block": 4, "exact": True, "dense_above": 0}}, tmp_path / "a")
    graph = load_graph(model)
    split_keep(graph)
    done = lower(graph)
    assert done["KeepLargest"] == done["SparseUp"] == 2
    save_graph(graph, tmp_path / "b.onnx")
    assert_standard(tmp_path / "b.onnx")
    assert_same(model, tmp_path / "b.onnx", "llama", 2e-5, [(1, 3), (2, 2)])


def test_an_op_without_a_rule_keeps_its_body(tmp_path: Path) -> None:
    """TensorRT's parser takes the body as it is; those of ops that are lowered go."""
    from trimtab.plugins import KEEP_TOKENS, add_multi_output_node

    graph = load_graph(compiled("bert", {"ffn-topk": TOPK | {"exact": True}}, tmp_path / "a"))
    inputs = {"importance": np.float32, "offsets": np.int32, "threshold": np.float32}
    given = {name: gs.Variable(name, dtype, ["n"]) for name, dtype in inputs.items()}
    graph.inputs += list(given.values())
    graph.outputs += add_multi_output_node(graph, KEEP_TOKENS, given, "keep")
    assert set(lower(graph)) == {"SelectBlocks", "SparseUp", "SparseDown"}
    assert [f.name for f in graph.functions] == ["KeepTokens"]
    save_graph(graph, tmp_path / "b.onnx")
    onnx.checker.check_model(str(tmp_path / "b.onnx"))


def test_nothing_to_do_changes_nothing(tmp_path: Path) -> None:
    graph = load_graph(exported("bert"))
    before = [node.name for node in graph.nodes], graph.opset
    assert lower(graph) == {} and ([node.name for node in graph.nodes], graph.opset) == before


def topk_model(path: Path, n: int, k: int, largest: int, dtype: str = "float") -> Path:
    text = f"""<ir_version: 9, opset_import: ["" : 18]>
    g ({dtype}[rows, {n}] x) => ({dtype}[rows, {k}] y, int64[rows, {k}] i) <int64[1] k = {{{k}}}>
    {{ y, i = TopK <axis = 1, largest = {largest}> (x, k) }}"""
    onnx.save(onnx.parser.parse_model(text), path)
    return path


@pytest.mark.parametrize(("n", "k"), [(11008, 5504), (9000, 9000), (8000, 3841)])
@pytest.mark.parametrize("largest", [1, 0])
def test_topk_of_more_than_tensorrt_takes_at_once(tmp_path: Path, n: int, k: int, largest: int) -> None:
    found, done = lowered(topk_model(tmp_path / "m.onnx", n, k, largest), tmp_path / "b")
    assert done == {"TopK": 1}
    x = seeded().permutation(3 * n).reshape(3, n).astype(np.float32)
    y, places = session(found).run(None, {"x": x})
    order = np.argsort(-x if largest else x, axis=1)[:, :k]
    np.testing.assert_array_equal(places, order)
    np.testing.assert_array_equal(y, np.take_along_axis(x, order, 1))
    sizes = [t for t in onnx.load(str(found)).graph.initializer if t.dims == [1] and t.data_type == 7]
    assert max(onnx.numpy_helper.to_array(t).item() for t in sizes) <= 3840


def test_topk_of_ties_takes_each_place_once(tmp_path: Path) -> None:
    found, _ = lowered(topk_model(tmp_path / "m.onnx", 6000, 5000, 1), tmp_path / "b")
    x = seeded().integers(0, 3, (2, 6000)).astype(np.float32)
    _, places = session(found).run(None, {"x": x})
    assert all(len(set(row)) == 5000 for row in places.tolist())


def test_a_choice_of_more_than_tensorrt_takes_at_once(tmp_path: Path) -> None:
    """5504 of 11008 neurons, as half of LLaMA-7B's: in rounds too, and the numbers in order where they are seen."""
    from trimtab.plugins import SELECT_BLOCKS, add_node

    graph = gs.Graph(opset=18, name="g")
    scores = gs.Variable("scores", np.float32, ["tokens", 11008])
    blocks = add_node(graph, SELECT_BLOCKS, {"scores": scores}, "blocks", k=5504)
    graph.inputs, graph.outputs = [scores], [blocks]
    save_graph(graph, tmp_path / "m.onnx")
    found, _ = lowered(tmp_path / "m.onnx", tmp_path / "b")
    assert_standard(found)
    x = seeded().normal(size=(2, 11008)).astype(np.float32)
    (got,) = session(found).run(None, {"scores": x})
    np.testing.assert_array_equal(got, np.sort(np.argsort(-x, axis=1)[:, :5504], axis=1))


def generated(path: Path, prompts: list[list[int]], heads: int, width: int) -> list[np.ndarray]:
    """Logits of the real tokens of `prompts`, and of three tokens behind each."""
    found = session(path)
    names = [t.name for t in found.get_outputs()]
    given = {t.name for t in found.get_inputs()}
    past = {name: np.zeros((len(prompts), heads, 0, width), np.float32) for name in given if name.startswith("past")}
    rng, longest = np.random.default_rng(5), max(map(len, prompts))
    mask = np.array([[1] * len(p) + [0] * (longest - len(p)) for p in prompts])
    ids = np.array([p + [0] * (longest - len(p)) for p in prompts])
    logits = []
    for _ in range(4):
        out = dict(zip(names, found.run(None, step_feeds(ids, mask, given) | past), strict=True))
        logits.append(out["logits"][mask[:, -ids.shape[1] :].astype(bool)])
        past = {name: out[name.replace("past_key_values", "present")] for name in past}
        ids, mask = rng.integers(3, 90, (len(prompts), 1)), np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
    return logits


@pytest.mark.parametrize(
    ("family", "exporter"),
    [("llama", "cached"), ("gpt2", "cached"), ("gemma", "cached"), ("qwen2", "cached"), ("llama", "genai")],
)
def test_attention_with_a_cache(tmp_path: Path, family: str, exporter: str) -> None:
    """Prompts of unlike length together: the cache of the shorter ones has gaps in one form, and none in the other."""
    model = exported(family, exporter)
    found, done = lowered(model, tmp_path / "b")
    assert done["GroupQueryAttention"] == tiny_model(family).config.num_hidden_layers
    assert_standard(found)
    config = tiny_model(family).config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    prompts = [[5, 6, 7, 8, 9], [4, 3], [11, 12, 13]]
    wanted, got = (generated(path, prompts, heads, width) for path in (model, found))
    for want, have in zip(wanted, got, strict=True):
        np.testing.assert_allclose(have, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("window", [-1, 2, 5])
@pytest.mark.parametrize(("heads", "kv_heads", "softcap"), [(4, 4, 0.0), (6, 2, 0.0), (4, 1, 3.0)])
@pytest.mark.parametrize("rotary", [0, 1, 2])
def test_options_of_attention(
    tmp_path: Path, window: int, heads: int, kv_heads: int, softcap: float, rotary: int
) -> None:
    """Against ONNX Runtime's own op: rotation (1: of halves, 2: of neighbours), windows, caps, shared keys."""
    width = 16
    rng = seeded()
    turn = f"do_rotary = 1, rotary_interleaved = {rotary - 1}, " if rotary else ""
    tables = ", cos, sin" if rotary else ""
    new = f"float[b, t, {heads * width}] q, float[b, t, {kv_heads * width}] k, float[b, t, {kv_heads * width}] v"
    cache = f"float[b, {kv_heads}, p, {width}] pk, float[b, {kv_heads}, p, {width}] pv"
    text = f"""<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]>
    g ({new}, {cache}, int64[b, n] attention_mask)
      => (float[b, t, {heads * width}] y, float[b, {kv_heads}, n, {width}] ok, float[b, {kv_heads}, n, {width}] ov)
      <float[32, 8] cos, float[32, 8] sin>
    {{
      one = Constant <value_ints = [1]> ()
      sum = ReduceSum <keepdims = 0> (attention_mask, one)
      last64 = Sub (sum, one)
      last = Cast <to = 6> (last64)
      size64 = Shape <start = 1> (attention_mask)
      size = Cast <to = 6> (size64)
      y, ok, ov = com.microsoft.GroupQueryAttention <num_heads = {heads}, kv_num_heads = {kv_heads}, {turn}
        local_window_size = {window}, softcap = {softcap}> (q, k, v, pk, pv, last, size{tables})
    }}"""
    model = onnx.parser.parse_model(text)
    del model.graph.initializer[:]
    angles = rng.uniform(0, 3, (32, 8)).astype(np.float32)
    if rotary:
        model.graph.initializer.extend(
            onnx.numpy_helper.from_array(table, name)
            for name, table in {"cos": np.cos(angles), "sin": np.sin(angles)}.items()
        )
    onnx.save(model, tmp_path / "m.onnx")
    found, _ = lowered(tmp_path / "m.onnx", tmp_path / "b")
    assert_standard(found)
    one, two = session(tmp_path / "m.onnx"), session(found)
    for batch, tokens, past in ((2, 1, 6), (1, 3, 5), (2, 4, 0)):
        shapes = {name: (batch, tokens, n * width) for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))}
        shapes |= dict.fromkeys(("pk", "pv"), (batch, kv_heads, past, width))
        feed: dict[str, np.ndarray] = {name: rng.normal(size=size).astype(np.float32) for name, size in shapes.items()}
        feed["attention_mask"] = np.ones((batch, past + tokens), np.int64)
        for want, got in zip(one.run(None, feed), two.run(None, feed), strict=True):
            np.testing.assert_allclose(got, want, atol=2e-5)


def test_small_ops_of_onnx_runtime(tmp_path: Path) -> None:
    rng = seeded()
    text = """<ir_version: 9, opset_import: ["" : 21, "com.microsoft" : 1]>
    g (float[rows, 64] x, float[rows, 64] r) => (float[rows, 32] y, float[rows, 64] s, float[rows, 64] t) {
      n = SimplifiedLayerNormalization <axis = -1, epsilon = 0.001> (x, w)
      a, empty1, empty2, s = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.01> (n, r, w)
      b, empty3, empty4, t = com.microsoft.SkipLayerNormalization <epsilon = 0.01> (a, s, w, bias, extra)
      c = com.microsoft.FastGelu (b, bias)
      d = com.microsoft.BiasGelu (c, bias)
      e = com.microsoft.QuickGelu <alpha = 1.5> (d)
      y = com.microsoft.MatMulNBits <N = 32, K = 64, bits = 4, block_size = 32> (e, q, scale)
    }"""
    model = onnx.parser.parse_model(text)
    weights = {
        "w": rng.uniform(0.5, 2, 64), "bias": rng.normal(size=64), "extra": rng.normal(size=64),
        "q": rng.integers(0, 256, (32, 2, 16)).astype(np.uint8), "scale": rng.uniform(0.5, 1, 64),
    }  # fmt: skip
    for name, array in weights.items():
        kept = array if array.dtype == np.uint8 else array.astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(kept, name))
    onnx.save(model, tmp_path / "m.onnx")
    found, done = lowered(tmp_path / "m.onnx", tmp_path / "b")
    assert len(done) == 7
    assert_standard(found)
    given = {name: rng.normal(size=(5, 64)).astype(np.float32) for name in "xr"}
    for want, got in zip(session(tmp_path / "m.onnx").run(None, given), session(found).run(None, given), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-2 * np.abs(want).max())  # MatMulNBits rounds x to int8 by blocks


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_integers_are_what_they_were(bits: int, tmp_path: Path) -> None:
    rng = seeded()
    model = onnx.parser.parse_model(f"""<ir_version: 9, opset_import: ["" : 21, "com.microsoft" : 1]>
    g (float[rows, 64] x) => (float[rows, 33] y) {{
      y = com.microsoft.MatMulNBits <N = 33, K = 64, bits = {bits}, block_size = 32> (x, q, scale)
    }}""")
    stored, scale = rng.integers(0, 256, (33, 2, 4 * bits)).astype(np.uint8), rng.uniform(0.5, 1, (33, 2))
    for name, array in {"q": stored, "scale": scale.astype(np.float32)}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, tmp_path / "m.onnx")
    found, _ = lowered(tmp_path / "m.onnx", tmp_path / "b")
    q = stored if bits == 8 else np.stack([stored % 16, stored // 16], -1).reshape(33, 2, 32)
    w = ((q.astype(float) - 2 ** (bits - 1)) * scale.astype(np.float32)[..., None]).reshape(33, 64)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # which would fuse them again
    runner = ort.InferenceSession(found, options)
    x = rng.normal(size=(5, 64)).astype(np.float32)
    np.testing.assert_allclose(runner.run(None, {"x": x})[0], x @ w.T, atol=1e-5 * np.abs(x @ w.T).max())


@pytest.mark.parametrize("keep", [1, 3, 9])
def test_no_more_blocks_are_kept_than_there_are(keep: int, tmp_path: Path) -> None:
    rng = seeded()
    model = onnx.parser.parse_model(f"""<ir_version: 9, opset_import: ["" : 21, "{DOMAIN}" : 1]>
    g (float[rows, 12] h, int32[1, 3] blocks) => (float[rows, 12] y) {{
      y = {DOMAIN}.KeepLargest <block = 4, keep = {keep}> (h, blocks, importance)
    }}""")
    importance = rng.uniform(0.5, 1, 20).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(importance, "importance"))
    onnx.save(model, tmp_path / "m.onnx")
    found, _ = lowered(tmp_path / "m.onnx", tmp_path / "b")
    h, blocks = rng.normal(size=(6, 12)).astype(np.float32), np.array([[0, 2, 4]], np.int32)
    scores = (np.abs(h).reshape(6, 3, 4) * importance.reshape(5, 4)[blocks[0]]).sum(-1)
    kept = scores >= np.sort(scores)[:, -min(keep, 3), None]
    got = session(found).run(None, {"h": h, "blocks": blocks})[0]
    np.testing.assert_array_equal(got, np.where(np.repeat(kept, 4, axis=1), h, 0))


def test_what_has_no_standard_form_is_named(tmp_path: Path) -> None:
    graph = load_graph(exported("llama", "cached"))
    node = next(node for node in graph.nodes if node.op == "GroupQueryAttention")
    node.attrs["smooth_softmax"], node.name = 1, "layer.0/attention"
    with pytest.raises(ModelError, match=r"layer\.0/attention: GroupQueryAttention with smooth_softmax"):
        lower(graph)
    graph = load_graph(exported("llama", "cached"))
    next(t for t in graph.inputs if t.name == "attention_mask").name = "other"
    with pytest.raises(ModelError, match="needs an input attention_mask"):
        lower(graph)


def test_counted_sizes(tmp_path: Path) -> None:
    """Of none, some and all; what ONNX Runtime itself finds."""
    rng = seeded()
    text = """<ir_version: 9, opset_import: ["" : 21]>
    g (float[a] one, bool[a, b] two, int64[a, b, c] three, bool[n] short) =>
      (int64[1, r] y1, int64[2, s] y2, int64[3, t] y3, bool[a, u] y4, int64[v] y5) {
      y1 = NonZero (one)
      y2 = NonZero (two)
      y3 = NonZero (three)
      y4 = Compress <axis = 1> (two, short)
      y5 = Compress (three, short)
    }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    found, done = lowered(tmp_path / "m.onnx", tmp_path / "b")
    assert done == {"NonZero": 3, "Compress": 2}
    assert {node.op_type for node in onnx.load(found).graph.node} & {"NonZero", "Compress"} == set()
    one, two = session(tmp_path / "m.onnx"), session(found)
    for a, b, c in ((1, 1, 1), (3, 4, 2), (5, 2, 7), (0, 3, 2)):
        for share in (0.0, 0.4, 1.0):
            some = [rng.random(size) < share for size in ((a,), (a, b), (a, b, c), (min(b, a * b * c),))]
            feed = dict(zip(("one", "two", "three", "short"), some, strict=True))
            feed |= {"one": np.where(some[0], rng.normal(size=a), 0).astype(np.float32)}
            feed |= {"three": np.where(some[2], -(2**40), 0)}
            for want, got in zip(one.run(None, feed), two.run(None, feed), strict=True):
                np.testing.assert_array_equal(got, want)


def test_a_counted_size_of_unknown_axes(tmp_path: Path) -> None:
    x, y = gs.Variable("x", np.float32, None), gs.Variable("y", np.int64, None)
    graph = gs.Graph([gs.Node("NonZero", "odd", inputs=[x], outputs=[y])], inputs=[x], outputs=[y], opset=21)
    with pytest.raises(ModelError, match="odd: the rank of its input"):
        lower(graph)
