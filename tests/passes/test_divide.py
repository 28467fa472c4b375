"""divide: the ranks together compute the one graph, each with its share; what cannot be divided says why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import zoo
from rewrite import canonical, profile_of, session
from seeds import seeded

from trimtab.passes import Pass, PassContext, pass_class, run_passes
from trimtab.passes.graph import is_external, save_graph, stored_bytes
from trimtab.passes.graph.cut import cut
from trimtab.passes.shard import Rank, divide

TOLERANCE = 1e-4
"""Of the largest value: sums in another order, and activations that kernels for integers round to 16 bits, by the
largest of 512 of which a rank sees a part."""


def together(ranks: list[Rank], feeds: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """What the ranks compute, joined here."""
    segments = [cut(rank.graph, [join.tensor for join in rank.joins]) for rank in ranks]
    how = {join.tensor.name: join.how for join in ranks[0].joins}
    held = [dict(feeds) for _ in ranks]
    for step in zip(*segments, strict=True):
        for values, segment in zip(held, step, strict=True):
            save_graph(segment.graph, folder / "segment.onnx")
            part = session(folder / "segment.onnx")
            found = part.run(None, {tensor.name: values[tensor.name] for tensor in part.get_inputs()})
            values |= dict(zip([tensor.name for tensor in part.get_outputs()], found, strict=True))
        for name in step[0].points:
            parts = [values[name] for values in held]
            whole = np.sum(parts, axis=0) if how[name] == "sum" else np.concatenate(parts, -1)
            for values in held:
                values[name] = whole
    for name in (tensor.name for tensor in ranks[0].graph.outputs):
        for values in held[1:]:
            np.testing.assert_array_equal(values[name], held[0][name])
    return held[0]


def check(graph: gs.Graph, family: str, shards: int, folder: Path) -> list[Rank]:
    save_graph(graph, folder / "whole.onnx")
    ranks = [divide(graph, rank, shards) for rank in range(shards)]
    rng = seeded()
    for batch, tokens in ((1, 1), (3, 9)):
        feeds = zoo.feeds(family, batch, tokens, rng)
        whole = session(folder / "whole.onnx")
        wanted = whole.run(None, {tensor.name: feeds[tensor.name] for tensor in whole.get_inputs()})
        found = together(ranks, feeds, folder)
        for tensor, value in zip(whole.get_outputs(), wanted, strict=True):
            np.testing.assert_allclose(found[tensor.name], value, rtol=0, atol=TOLERANCE * np.abs(value).max())
    return ranks


def passes(*named: tuple[str, dict[str, object]]) -> list[Pass]:
    return [pass_class(name).model_validate(options) for name, options in named]


def places(rank: Rank) -> list[str]:
    return [row["place"] for row in rank.result.details["places"]]


@pytest.mark.parametrize("family", zoo.FAMILIES)
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_dense_models(family: str, exporter: str, tmp_path: Path) -> None:
    graph = canonical(zoo.exported(family, exporter))
    ranks = check(graph, family, 4 if family in ("bert", "gpt2") else 2, tmp_path)
    count = len([p for p in places(ranks[0]) if "FFN" in p])
    assert count == zoo.tiny_model(family).config.num_hidden_layers > 0


def topk(**options: object) -> tuple[str, dict[str, object]]:
    return "ffn-topk", {"density": 0.2, "take": 0.4, "rank": 8, "dense_above": 5, **options}


@pytest.mark.parametrize(
    ("family", "steps"),
    [
        ("llama", [topk()]),
        ("llama", [topk(signal="both", common=0.1, shared=True)]),
        ("gemma", [topk(block=2, form="int8", weights="int8")]),
        ("opt", [topk(predictor="copy", weights="fp16")]),
        ("gpt2", [topk(weights="bf16", block=4), ("weight-only", {})]),
        ("llama", [topk(weights="int4"), ("weight-only", {"bits": 4})]),
        ("bert", [topk(density=1.0, take=None)]),
        ("bert", [("ffn-split", {"heavy": 0.5, "heavy_form": "fp16"})]),
        ("gemma", [("ffn-split", {"heavy": 0.5, "rank": 16})]),
        ("bert", [("ffn-split", {"heavy": 0.5, "rest_form": "low-rank", "rank": 16})]),
        ("bert", [("ffn-split", {"heavy": 0.5, "rest_form": "drop"})]),
        ("bert", [("ffn-split", {"heavy": 0.5, "rest_form": "fp16"})]),
        ("t5", [("weight-only", {"block": 16})]),
        ("t5", [("weight-only", {"block": 16, "bits": 4, "parts": ("ffn",)})]),
        ("opt", [topk(layers=(1,)), ("weight-only", {"parts": ("attention", "ffn")})]),
    ],
    ids=str,
)
def test_rewritten_models(family: str, steps: list[tuple[str, dict[str, object]]], tmp_path: Path) -> None:
    graph = canonical(zoo.exported(family))
    run_passes(graph, passes(*steps), PassContext(profile_of(graph), shards=2))
    ranks = check(graph, family, 2, tmp_path)
    assert ranks[0].result.changed > 0, ranks[0].result.left


def test_each_rank_adds_the_rest_once(tmp_path: Path) -> None:
    graph = canonical(zoo.exported("opt"))
    run_passes(graph, passes(topk(rest={"rank": 6})), PassContext(profile_of(graph), shards=2))
    assert sum(node.name.endswith("/with_rest") for node in graph.nodes) == 3
    for rank in check(graph, "opt", 2, tmp_path):
        choices = [node for node in rank.graph.nodes if node.op == "SelectBlocks"]
        assert len(choices) == 3  # of its own neurons alone


@pytest.mark.parametrize("steps", [[], [topk()], [("weight-only", {})]], ids=str)
def test_each_rank_has_its_share_of_the_weights(steps: list[tuple[str, dict[str, object]]]) -> None:
    graph = canonical(zoo.exported("llama"))
    run_passes(graph, passes(*steps), PassContext(profile_of(graph), shards=2))
    whole = sum(stored_bytes(t) for t in graph.tensors().values() if isinstance(t, gs.Constant))
    ranks = [divide(graph, rank, 2) for rank in range(2)]
    sizes = [sum(stored_bytes(t) for t in r.graph.tensors().values() if isinstance(t, gs.Constant)) for r in ranks]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01) and sizes[0] == ranks[0].result.details["rank_bytes"]
    ffn = 2 * 3 * 64 * 108 * {0: 4, 1: 4}.get(len(steps) if steps != [("weight-only", {})] else 2, 1)
    assert whole - sizes[0] > 0.45 * ffn


def test_nothing_is_read_before_it_is_written() -> None:
    graph = canonical(zoo.exported("gemma"))
    kept = {name for name, t in graph.tensors().items() if isinstance(t, gs.Constant) and is_external(t)}
    rank = divide(graph, 1, 2)
    for name, tensor in rank.graph.tensors().items():
        if isinstance(tensor, gs.Constant) and stored_bytes(tensor) > 4096:
            assert is_external(tensor) if name in kept else isinstance(tensor.values.base, np.memmap)
    assert {name for name, t in graph.tensors().items() if isinstance(t, gs.Constant) and is_external(t)} == kept


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_is_divided_and_a_tied_table_kept_whole_for_looking_up(tied: bool, tmp_path: Path) -> None:
    graph = vocabulary_model(tied)
    ranks = check_ids(graph, 3, tmp_path)
    assert places(ranks[0]) == ["layer 0 FFN", "head"]
    assert [join.how for join in ranks[0].joins] == ["sum", "concat"]
    shapes = [t.shape for t in ranks[1].graph.tensors().values() if isinstance(t, gs.Constant)]
    assert [60, 16] in [list(s) for s in shapes] and [20, 16] in [list(s) for s in shapes if s]


@pytest.mark.parametrize(
    "options", [{"take": 12, "rank": 6}, {"take": 12, "rank": 6, "weights": "int8"}, {"take": 60}], ids=str
)
def test_a_sparse_head(options: dict[str, object], tmp_path: Path) -> None:
    from trimtab.passes.profile import Profile, ProfileInfo

    graph = vocabulary_model(tied=True)
    profile = Profile(ProfileInfo(model="m", data="d", samples=1, tokens=1))
    profile.set_head(np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32))
    step = passes(("head-topk", {"dense_above": 4, **options}))
    details = run_passes(graph, step, PassContext(profile, shards=3))[0].details
    assert details["computed"] >= 12
    ranks = check_ids(graph, 3, tmp_path)
    assert places(ranks[0]) == ["layer 0 FFN", "head"]
    assert [t.shape[0] for t in ranks[2].graph.nodes[-1].inputs if isinstance(t, gs.Constant)] in ([], [1, 20, 20])


def vocabulary_model(tied: bool) -> gs.Graph:
    """ids → a table, an FFN of 24 neurons, a norm, a head of 60 tokens."""
    from trimtab.passes.graph import constant, insert

    rng = np.random.default_rng(3)
    ids = gs.Variable("input_ids", np.int64, ["batch", "tokens"])
    graph = gs.Graph([], [ids], [], opset=18)
    table = constant("table", rng.standard_normal((60, 16)).astype(np.float32))
    x = insert(graph, "Gather", [table, ids], "look up", dtype=np.float32)
    up, down = (
        constant(n, rng.standard_normal(s).astype(np.float32)) for n, s in (("up", (16, 24)), ("down", (24, 16)))
    )
    h = insert(graph, "Relu", [insert(graph, "MatMul", [x, up], "h", dtype=np.float32)], "relu", dtype=np.float32)
    y = insert(graph, "MatMul", [h, down], "y", dtype=np.float32)
    x.shape = y.shape = ["batch", "tokens", 16]
    x = insert(graph, "Add", [x, y], "residual", dtype=np.float32)
    norm = insert(
        graph, "LayerNormalization", [x, constant("scale", rng.random(16).astype(np.float32))], "norm", dtype=np.float32
    )
    rows = table if tied else constant("rows", rng.standard_normal((60, 16)).astype(np.float32))
    weight = insert(graph, "Transpose", [rows], "weight", attrs={"perm": [1, 0]}, dtype=np.float32)
    product = insert(graph, "MatMul", [norm, weight], "product", dtype=np.float32)
    bias = constant("bias", rng.standard_normal(60).astype(np.float32))
    logits = insert(graph, "Add", [product, bias], "logits", dtype=np.float32)
    x.shape = norm.shape = ["batch", "tokens", 16]
    product.shape = logits.shape = ["batch", "tokens", 60]
    graph.outputs = [logits]
    return graph


def check_ids(graph: gs.Graph, shards: int, folder: Path) -> list[Rank]:
    save_graph(graph, folder / "whole.onnx")
    ranks = [divide(graph, rank, shards) for rank in range(shards)]
    for batch, tokens in ((1, 1), (2, 3)):
        feeds = {"input_ids": seeded().integers(0, 60, (batch, tokens))}
        wanted = session(folder / "whole.onnx").run(None, feeds)[0]
        found = together(ranks, feeds, folder)["logits"]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())
    return ranks


@pytest.mark.parametrize(
    ("family", "shards", "steps", "where", "why"),
    [
        ("opt", 3, [], "layer 2 FFN", "92 neurons are not divisible by 3 shards"),
        ("llama", 2, [], "head", "131 vocabulary rows are not divisible by 2 shards"),
        ("opt", 3, [topk()], "layer 0 FFN", "92 neurons are not divisible by 3 shards"),
        ("llama", 2, [topk(block=4)], "layer 1 FFN", "27 blocks of 4 neurons are not divisible by 2 shards"),
        (
            "bert",
            2,
            [("weight-only", {"block": 16})],
            "layer 0 FFN",
            "40 neurons of a shard are not whole blocks of 16",
        ),
        ("bert", 3, [("ffn-split", {"heavy": 0.5})], "layer 0 FFN", "neurons are not divisible by 3 shards"),
        ("bert", 2, [("dynamic-int8", {})], "products of integers", "the range of a whole tensor"),
    ],
    ids=str,
)
def test_what_stays_whole_says_why(
    family: str, shards: int, steps: list[tuple[str, dict[str, object]]], where: str, why: str, tmp_path: Path
) -> None:
    graph = canonical(zoo.exported(family))
    run_passes(graph, passes(*steps), PassContext(profile_of(graph), shards=shards))
    before = [node.name for node in graph.nodes]
    ranks = check(graph, family, shards, tmp_path)
    assert any(where in left.where and why in left.why for left in ranks[0].result.left), ranks[0].result.left
    assert [node.name for node in graph.nodes] == before


def test_a_choice_among_all_is_not_divided() -> None:
    graph = canonical(zoo.exported("llama"))
    run_passes(graph, passes(topk()), PassContext(profile_of(graph)))
    left = divide(graph, 0, 2).result.left
    assert any("chosen among all, not by each of 2 shards" in place.why for place in left)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_bias_inside_a_product_is_added_once(transposed: bool, tmp_path: Path) -> None:
    """Gemm, as exporters write it for inputs without a batch."""
    from trimtab.passes.graph import constant, insert

    rng = seeded()
    x = gs.Variable("x", np.float32, ["n", 16])
    graph = gs.Graph([], [x], [], opset=18)
    tensor: gs.Tensor = x
    for name, (rows, columns) in (("up", (16, 24)), ("down", (24, 16))):
        weight = rng.standard_normal((rows, columns)).astype(np.float32)
        bias = constant(f"{name} bias", rng.standard_normal(columns).astype(np.float32))
        parts = [tensor, constant(name, weight.T if transposed else weight), bias]
        tensor = insert(graph, "Gemm", parts, f"{name}.y", attrs={"transB": int(transposed)}, dtype=np.float32)
        if name == "up":
            tensor = insert(graph, "Relu", [tensor], "relu", dtype=np.float32)
    graph.outputs = [insert(graph, "Add", [x, tensor], "y", dtype=np.float32)]
    save_graph(graph, tmp_path / "whole.onnx")
    ranks = [divide(graph, rank, 3) for rank in range(3)]
    assert places(ranks[0]) == ["layer 0 FFN"]
    feeds = {"x": rng.standard_normal((5, 16)).astype(np.float32)}
    (wanted,) = session(tmp_path / "whole.onnx").run(None, feeds)
    np.testing.assert_allclose(together(ranks, feeds, tmp_path)["y"], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
