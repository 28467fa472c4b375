"""ffn-topk: dense at its exact end; else what its predictor chooses, and as much of it as the report says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import zoo
from packed_encoder import Encoder
from rewrite import canonical, profile_of, run_part, session
from seeds import seeded

from trimtab.passes import PassContext, PassResult, run_passes
from trimtab.passes.anatomy import FFN, find_anatomy
from trimtab.passes.errors import PassError
from trimtab.passes.ffn_topk.importance import importance, most_important, norms, places, smallest
from trimtab.passes.ffn_topk.predictor import low_rank
from trimtab.passes.ffn_topk.topk import FFNTopK
from trimtab.passes.graph import save_graph
from trimtab.passes.sampled_ffn import SampledFFN

TEXT = [family for family in zoo.FAMILIES if family != "vit"]


def rewrite(graph: gs.Graph, **options: object) -> PassResult:
    context = PassContext(profile_of(graph))
    return run_passes(graph, [FFNTopK.model_validate({"most": 1.0, **options})], context)[0]


def layers_of(graph: gs.Graph) -> list[SampledFFN]:
    profile = profile_of(graph)
    return [SampledFFN(ffn, profile.ffn(ffn.layer, ffn.d_ff, ffn.d_model)) for ffn in find_anatomy(graph).ffns]


def outputs(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    run = session(path)
    return run.run(None, {i.name: feeds[i.name] for i in run.get_inputs()})  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", zoo.FAMILIES)
@pytest.mark.parametrize("options", [{}, {"block": 4}, {"shared": True}], ids=str)
def test_exact_end_equals_dense(family: str, options: dict[str, object], tmp_path: Path) -> None:
    path = zoo.exported(family)
    graph = canonical(path)
    result = rewrite(graph, density=1.0, **options)
    save_graph(graph, tmp_path / "topk.onnx")
    assert result.changed == len(find_anatomy(canonical(path)).ffns) > 0
    rng = seeded()
    for batch, tokens in ((1, 1), (1, 9), (3, 17)):
        feeds = zoo.feeds(family, batch, tokens, rng)
        for dense, ours in zip(outputs(path, feeds), outputs(tmp_path / "topk.onnx", feeds), strict=True):
            np.testing.assert_allclose(ours, dense, rtol=1e-4, atol=2e-4 * np.abs(dense).max())


@pytest.mark.parametrize("block", [1, 4])
def test_calls_without_tokens(block: int, tmp_path: Path) -> None:
    graph = Encoder(3).graph()
    assert rewrite(graph, density=0.2, take=0.5, rank=8, block=block).changed
    save_graph(graph, tmp_path / "topk.onnx")
    feeds = {"lengths": np.zeros(0, np.int32), "x": np.zeros((0, 24), np.float32)}
    assert outputs(tmp_path / "topk.onnx", feeds)[0].shape == (0, 3)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_calls_of_many_tokens_are_dense(family: str, tmp_path: Path) -> None:
    path = zoo.exported(family)
    graph = canonical(path)
    rewrite(graph, density=0.2, take=0.3, rank=8, dense_above=6)
    save_graph(graph, tmp_path / "topk.onnx")
    rng = seeded()
    for tokens, same in ((7, True), (6, False)):
        feeds = zoo.feeds(family, 1, tokens, rng)
        (dense,), (ours,) = outputs(path, feeds), outputs(tmp_path / "topk.onnx", feeds)
        assert np.allclose(ours, dense, rtol=1e-4, atol=2e-4 * np.abs(dense).max()) is same


@pytest.mark.parametrize("family", ["llama", "gemma", "opt", "gpt2", "bert"])
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 8},
        {"rank": 8, "signal": "both"},
        {"rank": 8, "block": 4},
        {"rank": 8, "common": 0.1},
        {"predictor": "copy", "form": "int8"},
        {"predictor": "copy", "form": "int4"},
        {"rank": 16, "form": "int8", "shared": True},
    ],
    ids=str,
)
def test_graph_computes_what_the_predictor_chooses(family: str, options: dict[str, object], tmp_path: Path) -> None:
    """Masked dense computation, with the blocks that numpy finds by the fitted predictor."""
    graph = canonical(zoo.exported(family))
    layers = layers_of(graph)
    step = FFNTopK.model_validate({"density": 0.2, "take": 0.4, "dense_above": 1000, **options})
    wanted: dict[str, tuple[str, np.ndarray, np.ndarray]] = {}
    for layer in layers:  # before the pass, which takes the dense nodes away
        x, choice, ffn = layer.held_out[:9], step._choose(layer), layer.ffn
        scores = choice.predictor.scores(x)
        if options.get("shared"):
            scores = np.broadcast_to(scores.max(0), scores.shape)
        mask = np.zeros((len(x), ffn.d_ff // step.block, step.block))
        np.put_along_axis(mask, most_important(scores, choice.take)[:, :, None], 1, axis=1)
        h = layer.hidden(x, layer.ups, layer.up_biases).astype(np.float64) * mask.reshape(len(x), -1)
        wanted[ffn.x.name] = f"ffn-topk/layer.{ffn.layer}", x, h @ layer.down + layer.down_bias
    run_passes(graph, [step], PassContext(profile_of(graph)))
    for name, (made, x, y) in wanted.items():
        got = run_part(graph, name, _output(graph, made), x[None], tmp_path)[0]
        off = np.abs(got - y).max(1) > 1e-3 * np.abs(y).max()
        assert off.mean() <= 0.12  # a score at the cut may fall on either side


def _output(graph: gs.Graph, made: str) -> str:
    """The output of an FFN whose nodes are called `made`/..."""
    shift = graph.tensors().get(f"{made}/shift")
    return shift.name if shift is not None else f"{made}/down.y"


def recall(truth: np.ndarray, k: int, taken: np.ndarray) -> float:
    """Share of the k most important neurons among those taken; one that contributes nothing counts as found."""
    wanted = np.argsort(-truth, axis=1, kind="stable")[:, :k]
    found = [np.isin(w, t) | (row[w] == 0) for row, w, t in zip(truth, wanted, taken, strict=True)]
    return float(np.mean(found))


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize(
    "options", [{"rank": 12}, {"rank": 12, "signal": "both"}, {"predictor": "copy", "form": "int4"}], ids=str
)
def test_reported_recall_is_true_and_least(family: str, options: dict[str, object]) -> None:
    graph = canonical(zoo.exported(family))
    layers, step = layers_of(graph), FFNTopK.model_validate({"density": 0.2, "recall": 0.9, "most": 1.0, **options})
    for layer in layers:
        choice = step._choose(layer)
        truth = importance(layer.h_held_out, norms(layer), 1)
        order = np.argsort(-choice.predictor.scores(layer.held_out), axis=1, kind="stable")
        recalls = [recall(truth, choice.k, order[:, :take]) for take in (choice.take, choice.take - 1)]
        assert recalls[0] == pytest.approx(choice.recall, abs=1e-6)
        assert recalls[0] >= 0.9
        assert recalls[1] < 0.9 or choice.take == choice.k


def test_a_perfect_predictor_takes_no_more_than_wanted() -> None:
    for family, options in (("llama", {"signal": "both"}), ("opt", {})):
        graph = canonical(zoo.exported(family))
        rows = rewrite(graph, density=0.2, predictor="copy", **options).details["layers"]
        assert all(row["wanted"] == row["computed"] and row["recall"] == 1 for row in rows)


def test_low_rank_is_the_best_of_its_rank() -> None:
    rng = seeded()
    x = (rng.standard_normal((2000, 24)) @ rng.standard_normal((24, 24))).astype(np.float32)
    w, importance_ = rng.standard_normal((24, 50)).astype(np.float32), rng.random(50).astype(np.float32)
    left, right = low_rank(w, x, importance_, 5)
    wanted = x.astype(np.float64) @ w * importance_
    error = np.square(wanted - x @ left @ right * importance_).sum()
    singular = np.linalg.svd(wanted, compute_uv=False)  # Eckart and Young: no map of rank 5 errs less
    assert error <= 1.02 * np.square(singular[5:]).sum()
    u, s, v = np.linalg.svd(w, full_matrices=False)
    plain = np.square(wanted - x @ (u[:, :5] * s[:5]) @ v[:5] * importance_).sum()
    assert error < 0.9 * plain


def test_common_neurons_are_always_taken() -> None:
    graph = canonical(zoo.exported("llama"))
    (layer, *_), step = layers_of(graph), FFNTopK(density=0.2, take=0.3, rank=4, common=0.1)
    choice = step._choose(layer)
    common = choice.predictor.common
    assert common is not None and len(common) == round(0.1 * layer.ffn.d_ff)
    chosen = most_important(choice.predictor.scores(layer.held_out), choice.take)
    assert all(np.isin(common, row).all() for row in chosen)
    truth = most_important(importance(layer.h_fit, norms(layer), 1), choice.k)
    often = np.bincount(truth.reshape(-1), minlength=layer.ffn.d_ff)
    assert often[common].min() >= np.delete(often, common).max()


@pytest.mark.parametrize(("weights", "tolerance"), [("fp16", 2e-3), ("bf16", 2e-2), ("int8", 3e-2), ("int4", 0.4)])
def test_weights_in_every_form(weights: str, tolerance: float, tmp_path: Path) -> None:
    path = zoo.exported("llama")
    graph = canonical(path)
    dense = {f.layer: f for f in find_anatomy(canonical(path)).ffns}
    rows = rewrite(graph, density=1.0, weights=weights).details["layers"]
    rng = seeded()
    for row in rows:
        ffn: FFN = dense[row["layer"]]
        x = rng.standard_normal((1, 5, ffn.d_model)).astype(np.float32)
        wanted = run_part(canonical(path), ffn.x.name, ffn.y.name, x, tmp_path)
        got = run_part(graph, ffn.x.name, _output(graph, f"ffn-topk/layer.{row['layer']}"), x, tmp_path)
        assert 0 < np.linalg.norm(got - wanted) < tolerance * np.linalg.norm(wanted)
        assert row["bytes"] < row["dense_bytes"] * {"fp16": 0.51, "bf16": 0.51, "int8": 0.28, "int4": 0.17}[weights]


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_integer_predictors_raise_the_opset(form: str, tmp_path: Path) -> None:
    """To that of integers in blocks, whatever the exporter wrote."""
    graph = canonical(zoo.exported("llama", "torchscript"))
    assert graph.opset < 21
    assert rewrite(graph, density=0.2, take=0.5, predictor="copy", signal="both", form=form).changed
    save_graph(graph, tmp_path / "topk.onnx")
    onnx.checker.check_model(tmp_path / "topk.onnx", full_check=True)
    outputs(tmp_path / "topk.onnx", zoo.feeds("llama", 2, 5, np.random.default_rng(0)))


def test_places_and_smallest() -> None:
    scores = np.array([[5.0, 1, 4, 2], [0, 3, 2, 1]])
    truth = np.array([[9.0, 0, 1, 8], [7, 8, 0, 0]])
    found_at = places(scores, truth, 2)
    np.testing.assert_array_equal(np.sort(found_at), [[1, 3], [1, 4]])
    assert [smallest(found_at, recall) for recall in (0.25, 0.5, 0.75, 0.76, 1.0)] == [1, 1, 3, 4, 4]
    np.testing.assert_array_equal(np.sort(places(scores, truth, 3)[1]), [0, 1, 4])  # nothing to be found there


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": (7,)}, "no FFN 7"),
        ({"density": 0.1, "rank": 1, "recall": 1.0, "most": 0.15}, r"no FFN finds 100%.*the best has \d+\.\d%"),
    ],
)
def test_refuses(options: dict[str, object], says: str) -> None:
    graph = canonical(zoo.exported("llama"))
    with pytest.raises(PassError, match=says):
        rewrite(graph, **options)


@pytest.mark.parametrize(
    "options",
    [{"density": 0.0}, {"density": 1.1}, {"recall": 0}, {"block": 0}, {"rank": 0}, {"density": 0.3, "take": 0.2}],
)
def test_impossible_options(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"greater|less|take: 0.2 computes fewer neurons than density 0.3 wants"):
        FFNTopK.model_validate(options)


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("llama", {"block": 7}, "blocks of 7 do not divide its 108"),
        ("gemma", {"weights": "int4"}, "do not divide its 40 inputs"),
    ],
)
def test_leaves_what_does_not_fit(family: str, options: dict[str, object], says: str) -> None:
    graph = canonical(zoo.exported(family))
    result = rewrite(graph, **options)
    assert result.changed == 0 and all(says in left.why for left in result.left) and result.left
