from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
import zoo
from seeds import seeded

from trimtab.compiler import feeds as feeds_module
from trimtab.compiler.builds.manifest import TensorInfo
from trimtab.compiler.checks.peers import open_peer
from trimtab.compiler.feeds import converted, converting, random_feeds, within
from trimtab.compiler.workload import Workload
from trimtab.passes.errors import RecipeError
from trimtab.passes.graph import load_graph


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_family_runs_on_random_feeds(family):
    model = zoo.exported(family)
    run = open_peer("dense-fp32", model, 1)
    for batch, tokens in ((1, 1), (3, 17)):
        feeds = random_feeds(load_graph(model), {"batch": batch, "tokens": tokens}, np.random.default_rng(batch))
        for name, value in run(feeds).items():
            assert np.isfinite(value).all(), name
            assert len(value) == batch


def test_inputs_that_are_texts() -> None:
    texts = gs.Graph(inputs=[gs.Variable("s", np.dtype(object), ["batch", 3])])
    found = random_feeds(texts, {"batch": 5}, seeded())["s"]
    assert found.shape == (5, 3) and all(isinstance(text, str) for text in found.flat)


def test_ids_stay_inside_the_table_and_reach_all_of_it():
    graph = load_graph(zoo.exported("bert"))
    ids = random_feeds(graph, {"batch": 32, "tokens": 64}, np.random.default_rng(0))["input_ids"]
    assert ids.min() == 0
    assert ids.max() == 100  # of a vocabulary of 101


@pytest.mark.parametrize("width", [1 << 20, (1 << 20) + 1])
def test_random_inputs_have_a_limit(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are compared before memory is taken: a fixed dimension comes from the file."""
    monkeypatch.setattr(feeds_module, "MAX_BYTES", 4 << 20)
    x = gs.Variable("x", np.float32, ["batch", width])
    graph = gs.Graph([gs.Node("Identity", inputs=[x], outputs=[gs.Variable("y", np.float32)])], [x], [], opset=18)
    dims = {"batch": 1, "tokens": 1}
    if width == 1 << 20:
        assert random_feeds(graph, dims, seeded())["x"].nbytes == 4 << 20
    else:
        with pytest.raises(RecipeError, match=r"4194308 bytes, more than 4194304; the largest is 'x'"):
            random_feeds(graph, dims, seeded())


def test_padding_ends_rows_early_and_leaves_the_first_full():
    graph = load_graph(zoo.exported("bert"))
    dims = {"batch": 8, "tokens": 16}
    assert (random_feeds(graph, dims, np.random.default_rng(0))["attention_mask"] == 1).all()
    for seed in range(20):
        mask = random_feeds(graph, dims, np.random.default_rng(seed), padded=True)["attention_mask"]
        lengths = mask.sum(1)
        assert (np.diff(mask, axis=1) <= 0).all()
        assert lengths[0] == 16
        assert lengths.min() == 8
    alone = random_feeds(graph, {"batch": 1, "tokens": 16}, np.random.default_rng(0), padded=True)["attention_mask"]
    assert alone.sum() == 8


def test_a_dimension_without_a_size_is_named():
    graph = load_graph(zoo.exported("bert"))
    for tensor in graph.inputs:
        tensor.shape = [*tensor.shape, "beams"]
    with pytest.raises(RecipeError, match="beams"):
        random_feeds(graph, {"batch": 2, "tokens": 8}, np.random.default_rng(0))
    assert (
        random_feeds(graph, {"batch": 2, "tokens": 8, "beams": 3}, np.random.default_rng(0))["input_ids"].shape[2] == 3
    )


def test_within_brings_a_small_batch_to_the_least_size_and_back():
    model = zoo.exported("distilbert")
    run = open_peer("dense-fp32", model, 1)
    feeds = random_feeds(load_graph(model), {"batch": 1, "tokens": 5}, np.random.default_rng(0))
    seen = []

    def recording(fed):
        seen.append({name: value.shape for name, value in fed.items()})
        return run(fed)

    workload = Workload(batch=(4, 4, 4), tokens=(8, 8, 8))
    out = within(recording, load_graph(model), workload)(feeds | {"unknown": np.zeros((1, 5))})["last_hidden_state"]
    assert seen == [{"input_ids": (4, 8), "attention_mask": (4, 8)}]
    np.testing.assert_allclose(out, run(feeds)["last_hidden_state"], atol=1e-5)


@pytest.mark.parametrize("heads_like_tokens", [False, True])
def test_within_fills_up_prompts_of_a_decoder(heads_like_tokens: bool) -> None:
    """Columns go behind ids and mask, none into the cache; a cache with as many heads as tokens stays whole."""
    model = zoo.exported("qwen2", "cached")  # 2 heads of keys
    run, graph, rng = open_peer("dense-fp32", model, 1), load_graph(model), seeded()
    tokens, least = (2, 2) if heads_like_tokens else (3, 7)
    feeds = random_feeds(graph, {"batch": 2, "tokens": tokens}, rng, padded=True)
    out = within(run, graph, Workload(batch=(5, 5, 5), tokens=(least, least, least)))(feeds)
    wanted = run(feeds)
    real = feeds["attention_mask"] != 0
    assert out["logits"].shape == wanted["logits"].shape
    np.testing.assert_allclose(out["logits"][real], wanted["logits"][real], atol=1e-5)
    present = out["present.0.key"]
    assert present.shape[:2] == wanted["present.0.key"].shape[:2]


def test_padding_behind_a_past_is_in_the_past() -> None:
    graph = load_graph(zoo.exported("llama", "cached"))
    run = open_peer("dense-fp32", zoo.exported("llama", "cached"), 1)
    for batch, tokens, past in ((1, 6, 9), (4, 1, 9)):
        feeds = random_feeds(graph, {"batch": batch, "tokens": tokens, "past": past}, seeded(), padded=True)
        mask = feeds["attention_mask"]
        assert mask.shape == (batch, past + tokens) and mask[:, past:].all() and not mask[-1, :past].all()
        assert (np.diff(mask[:, :past], axis=1) <= 0).all()
        assert np.isfinite(run(feeds)["logits"]).all()


def test_positions_count_from_the_past_on() -> None:
    shapes = {"input_ids": ["N", "T"], "position_ids": ["N", "T"], "past_key_values.0.key": ["N", 1, "P", 4]}
    kinds = {"past_key_values.0.key": np.float32}
    graph = gs.Graph(inputs=[gs.Variable(n, kinds.get(n, np.int64), shape) for n, shape in shapes.items()])
    feeds = random_feeds(graph, {"batch": 2, "tokens": 3, "past": 5}, seeded())
    assert feeds["position_ids"].tolist() == [[5, 6, 7]] * 2


def test_floats_are_converted_to_the_types_of_a_build() -> None:
    inputs = [gs.Variable("half", np.float16, [None]), gs.Variable("ids", np.int32, [None])]
    feeds = {"half": np.ones(3, np.float32), "ids": np.ones(3, np.int64), "other": np.ones(3)}
    kinds = {name: value.dtype for name, value in converted(feeds, inputs).items()}
    assert kinds == {"half": np.float16, "ids": np.int64, "other": np.float64}
    assert converting(lambda fed: fed, [TensorInfo.of(inputs[0])])(feeds)["half"].dtype == np.float16


def test_real_ids_come_in_runs_of_the_text():
    graph = load_graph(zoo.exported("bert"))
    ids = np.arange(5, 55)
    feeds = random_feeds(graph, {"batch": 6, "tokens": 9}, np.random.default_rng(1), ids=ids)["input_ids"]
    assert feeds.shape == (6, 9) and set(feeds.ravel()) <= set(ids)
    assert (np.diff(feeds, axis=1) % len(ids) == 1).all()
    assert len(set(feeds[:, 0])) > 1


WAYS = {
    "behind Transpose": "turned = Transpose (table) y = Gather <axis = 1> (turned, ids)",
    "scaled": "scaled = Mul (table, two) y = Gather (scaled, ids)",
    "GatherND": "each = Unsqueeze (ids, axes) y = GatherND (table, each)",
    "behind Where": "less = Less (ids, zero) real = Where (less, zero, ids) y = Gather (table, real)",
    "behind Slice": "first = Slice (ids, ones, many, ones) y = Gather (table, first)",
    "unknown": "twice = Mul (ids, six) y = Gather (table, twice)",
}


@pytest.mark.parametrize(
    ("way", "kind"),
    [
        *((way, kind) for way in WAYS for kind in ("int64", "int32")),
        *((way, "float") for way in WAYS if way != "unknown"),
    ],
)
def test_ids_of_small_tables(way: str, kind: str, tmp_path: Path) -> None:
    """Made-up ids stay inside, whatever way they take to a table of 7 rows."""
    body = WAYS[way]
    if kind != "int64":
        body = f"whole = Cast <to = 7> (given) {body.replace('ids', 'whole')}"
    text = f"""
    <ir_version: 10, opset_import: ["" : 21]>
    g ({kind}[batch, tokens] {"ids" if kind == "int64" else "given"}) => (float[N] y)
    <float two = {{2}}, int64[1] axes = {{2}}, int64 zero = {{0}}, int64 six = {{6}}, int64[1] ones = {{1}},
     int64[1] many = {{99}}>
    {{ {body} }}
    """
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((7, 2), np.float32), "table"))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    feeds = random_feeds(load_graph(tmp_path / "model.onnx"), {"batch": 4, "tokens": 50}, seeded())
    session.run(None, feeds)
    if way != "unknown":
        (given,) = feeds.values()
        assert (given.min(), given.max()) == (0, 6)
