"""Weights that layers share: held once, rewritten once, counted once, whatever form an exporter gave them."""

from __future__ import annotations

import secrets
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import torch
import zoo
from onnx import TensorProto, helper, numpy_helper
from rewrite import canonical, head_profile, profile_of, session
from sharing import LAYOUTS, Layout, Shape, write

from trimtab.compiler.inspect import describe
from trimtab.passes import Capability, PassContext, PassResult, run_passes
from trimtab.passes.anatomy import by_weights, find_anatomy
from trimtab.passes.contract import Pass
from trimtab.passes.dynamic_int8 import DynamicInt8
from trimtab.passes.ffn_split import FFNSplit
from trimtab.passes.ffn_topk.topk import FFNTopK
from trimtab.passes.graph import load_graph, save_graph, stored_bytes, values
from trimtab.passes.graph.linear import distinct_bytes
from trimtab.passes.head_topk.topk import HeadTopK
from trimtab.passes.sampled_ffn import sample_ffn
from trimtab.passes.static_int8 import StaticInt8
from trimtab.passes.weight_only import WeightOnly
from trimtab.plugins.library import register
from trimtab.training.ops import OPS

EVERYTHING = Capability(weight_bits=frozenset({2, 4, 8}))
SHAPES = [
    Shape(),
    Shape(layers=6, groups=2, activation="Relu"),
    Shape(layers=4, groups=2, gated=True, activation="Sigmoid"),
]


@pytest.fixture
def seed() -> int:
    """Another one each time; printed, so that a failure can be repeated."""
    found = secrets.randbelow(10**6)
    print("seed", found)
    return found


def rewritten(graph: gs.Graph, step: Pass, seed: int = 0) -> PassResult:
    context = PassContext(profile_of(graph, seed=seed), EVERYTHING)
    return run_passes(graph, [step], context)[0]


def bytes_on_disk(graph: gs.Graph, folder: Path, name: str = "model") -> int:
    """Of the graph as it is saved, less what separates tensors in the data file."""
    save_graph(graph, folder / f"{name}.onnx")
    return sum(
        stored_bytes(t) for t in load_graph(folder / f"{name}.onnx").tensors().values() if isinstance(t, gs.Constant)
    )


def answers(path: Path, x: np.ndarray) -> np.ndarray:
    found: np.ndarray = session(path).run(None, {"x0": x})[0]
    return found


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def optimised(path: Path, folder: Path) -> list[str]:
    """The ops that ONNX Runtime makes of a model."""
    options = ort.SessionOptions()
    register(options)
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimised.onnx"), 3
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_matrix_is_held_once(layout: Layout, shape: Shape, seed: int, tmp_path: Path) -> None:
    shape = replace(shape, layout=layout)
    path = write(tmp_path / "source.onnx", shape, seed)
    graph = canonical(path)
    assert shape.ffn_bytes < bytes_on_disk(graph, tmp_path) < 1.1 * shape.ffn_bytes
    ffns = find_anatomy(graph).ffns
    assert [[f.layer for f in group] for group in by_weights(ffns)] == [
        list(range(group, shape.layers, shape.groups)) for group in range(shape.groups)
    ]
    x = shape.states(seed)
    np.testing.assert_allclose(answers(tmp_path / "model.onnx", x), answers(path, x), rtol=1e-5, atol=1e-5)


def test_what_differs_or_is_repeated_stays(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((70, 90)).astype(np.float32)
    other, row, column = w.copy(), *rng.integers(0, (70, 90))
    other[row, column] += 1
    q, scale = rng.integers(-8, 8, (64, 90)).astype(np.int8), np.ones((2, 90), np.float32)
    held_out = {
        "w": w, "copy": w, "other": other, "wt": np.ascontiguousarray(w.T), "ot": np.ascontiguousarray(other.T),
        "ones": np.ones(90, np.float32), "ones again": np.ones(90, np.float32),
        "q": q, "q again": q, "scale": scale, "scale again": scale,
    }  # fmt: skip
    products = [("x", "w"), ("x", "copy"), ("x", "other"), ("z", "wt"), ("z", "ot")]
    nodes = [helper.make_node("MatMul", [x, name], [f"{x} {name}"]) for x, name in products]
    nodes += [helper.make_node("Add", ["z", name], [f"z {name}"]) for name in ("ones", "ones again")]
    for name in ("", " again"):
        inputs = [f"q{name}", f"scale{name}"]
        nodes += [helper.make_node("DequantizeLinear", inputs, [f"d{name}"], axis=0, block_size=32)]
        nodes += [helper.make_node("MatMul", ["v", f"d{name}"], [f"y{name}"])]
    outputs = [node.output[0] for node in nodes if node.op_type != "DequantizeLinear"]
    graph = helper.make_graph(
        nodes,
        "net",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", d])
            for name, d in (("x", 70), ("z", 90), ("v", 64))
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in held_out.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    left = {t.name for t in canonical(tmp_path / "m.onnx").tensors().values() if isinstance(t, gs.Constant)}
    gone = set(held_out) - left
    assert len(gone) == 3 and "copy" in gone and len(gone & {"w", "wt"}) == len(gone & {"other", "ot"}) == 1


@pytest.mark.parametrize("layout", ["copied", "transposed", "gemm"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{"heavy": 1.0}, {"heavy": 0.4, "rest_form": "fp32", "multiple": 4}], ids=str)
def test_an_exact_split_computes_the_dense_model_and_is_no_larger(
    layout: Layout, shape: Shape, options: dict[str, object], seed: int, tmp_path: Path
) -> None:
    shape = replace(shape, layout=layout)
    path = write(tmp_path / "source.onnx", shape, seed)
    graph = canonical(path)
    dense = bytes_on_disk(graph, tmp_path, "dense")
    result = rewritten(graph, FFNSplit.model_validate(options))
    assert result.changed == shape.layers and not result.left
    assert dense <= bytes_on_disk(graph, tmp_path) < 1.02 * dense
    x = shape.states(seed)
    np.testing.assert_allclose(answers(tmp_path / "model.onnx", x), answers(path, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("budget", [{"size": 0.3}, {"size": 0.15}, {"time": 0.4}, {"error": 0.3}], ids=str)
def test_a_budget_holds_for_the_file_and_for_every_use(budget: dict[str, float], seed: int, tmp_path: Path) -> None:
    shape = Shape(layers=6, groups=2, layout="copied", neurons=192)
    graph = canonical(write(tmp_path / "source.onnx", shape, seed))
    result = rewritten(graph, FFNSplit.model_validate({"budget": budget, "block": 32}), seed)
    rows = result.details["layers"]
    assert [row["layer"] for row in rows] == list(range(6))
    dense = sum(row["dense_bytes"] for row in rows)
    assert shape.ffn_bytes < dense < 1.02 * shape.ffn_bytes
    stored = bytes_on_disk(graph, tmp_path)
    others = 4 * shape.width + 512  # the norm's scale; scalars and sizes
    assert result.details["ffn_bytes"] <= stored < result.details["ffn_bytes"] + others
    if "size" in budget:
        assert result.details["ffn_bytes"] <= budget["size"] * dense
    elif "time" in budget:
        assert sum(row["macs"] for row in rows) <= budget["time"] * 6 * 2 * shape.width * shape.neurons
    else:
        assert np.mean([row["error"] for row in rows]) <= 1.1 * budget["error"]  # the search estimates


def test_layers_that_share_weights_are_fitted_as_one(seed: int, tmp_path: Path) -> None:
    shape = Shape(layers=3, activation="Relu")
    graph = canonical(write(tmp_path / "source.onnx", shape, seed))
    profile = profile_of(graph, seed=seed)
    first, *others = find_anatomy(graph).ffns
    layer = sample_ffn(first, profile, others)
    each = [profile.ffn(ffn.layer, ffn.d_ff, ffn.d_model) for ffn in (first, *others)]
    np.testing.assert_allclose(layer.stats.square_sum, sum(stats.square_sum for stats in each))
    assert layer.stats.tokens == sum(stats.tokens for stats in each)
    alone = [sample_ffn(ffn, profile) for ffn in (first, *others)]
    np.testing.assert_array_equal(layer.fit, np.concatenate([one.fit for one in alone]))
    np.testing.assert_array_equal(layer.held_out, np.concatenate([one.held_out for one in alone]))
    wrong = [0.1 * (i + 1) * np.ones_like(one.y_held_out) for i, one in enumerate(alone)]
    got = layer.error(np.concatenate([one.y_held_out + w for one, w in zip(alone, wrong, strict=True)]))
    assert got == pytest.approx(
        np.mean([one.error(one.y_held_out + w) for one, w in zip(alone, wrong, strict=True)]), rel=0.1
    )


def test_a_neuron_that_one_of_the_layers_needs_is_kept(seed: int, tmp_path: Path) -> None:
    """In each layer other neurons are alive: what is kept is not the choice of the first layer."""
    shape = Shape(layers=3, neurons=96, activation="Relu")
    graph = canonical(write(tmp_path / "source.onnx", shape, seed))
    profile = profile_of(graph, seed=seed)
    ffns = find_anatomy(graph).ffns
    for i, ffn in enumerate(ffns):
        stats = profile.ffn(ffn.layer, ffn.d_ff, ffn.d_model)
        alive = np.zeros(96)
        alive[32 * i : 32 * i + 16] = stats.tokens
        profile.set_ffn(i, replace(stats, abs_sum=alive, sum=alive, square_sum=2 * alive))
    up = values(ffns[0].up.weight).copy()
    step = FFNSplit(heavy=0.5, rest_form="drop", score="activation", multiple=16)
    run_passes(graph, [step], PassContext(profile, EVERYTHING))
    kept = values(next(t for n, t in graph.tensors().items() if n.endswith("heavy/up.weight")))
    columns = {int(np.argmax((up == kept[:, [j]]).all(0))) for j in range(kept.shape[1])}
    assert columns == {*range(16), *range(32, 48), *range(64, 80)}


def test_ffns_that_share_part_of_their_weights_are_left(seed: int, tmp_path: Path) -> None:
    graph = canonical(write(tmp_path / "source.onnx", Shape(own_biases=True), seed))
    result = rewritten(graph, FFNSplit(heavy=0.5))
    assert result.changed == 0 and len(result.left) == 4
    assert all("shares a matrix with layer" in left.why for left in result.left)


def test_a_budget_of_bytes_leaves_weights_that_stay_for_others(seed: int, tmp_path: Path) -> None:
    graph = canonical(write(tmp_path / "source.onnx", Shape(), seed))
    result = rewritten(graph, FFNSplit.model_validate({"budget": {"size": 0.5}, "layers": (0, 2)}))
    assert result.changed == 0 and all("reads its weights too" in left.why for left in result.left)
    result = rewritten(graph, FFNSplit(heavy=0.5, layers=(0, 2)))
    assert result.changed == 2
    assert result.details["ffn_bytes"] <= bytes_on_disk(graph, tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("bits", "size"), [(4, 0.17), (8, 0.3)])
def test_integers_in_blocks_are_stored_once_and_fuse(
    layout: Layout, bits: int, size: float, seed: int, tmp_path: Path
) -> None:
    shape = Shape(layers=5, layout=layout, gated=True)
    path = write(tmp_path / "source.onnx", shape, seed)
    graph = canonical(path)
    result = rewritten(graph, WeightOnly.model_validate({"bits": bits}))
    assert result.changed == shape.products and not result.left
    assert bytes_on_disk(graph, tmp_path) < size * shape.ffn_bytes + 2000
    assert result.details["bytes"] < result.details["ffn_bytes"] <= bytes_on_disk(graph, tmp_path)
    ops = optimised(tmp_path / "model.onnx", tmp_path)
    assert ops.count("MatMulNBits") == shape.products and "DequantizeLinear" not in ops
    x = np.concatenate([shape.states(seed + i) for i in range(32)])  # of a few alone, the error varies by a tenth
    exact = 0.04 if bits == 8 else 0.27  # activations are rounded to int8 too
    assert error(answers(tmp_path / "model.onnx", x), answers(path, x)) < exact


def test_shared_integers_are_those_of_one_use(seed: int, tmp_path: Path) -> None:
    """What five layers read is what a DequantizeLinear of the same matrix gives."""
    dense = write(tmp_path / "source.onnx", Shape(layers=1), seed)
    several = write(tmp_path / "several.onnx", Shape(layers=5), seed)
    for step in (WeightOnly(bits=4), WeightOnly(bits=8), FFNSplit(heavy=1.0, heavy_form="int4", refit=False)):
        matrices = []
        for path in (dense, several):
            graph = canonical(path)
            rewritten(graph, step)
            found = find_anatomy(graph).ffns[0]
            matrices.append([linear.w() for linear in found.linears])
        if isinstance(step, WeightOnly):  # a split fits to the states, which differ
            for one, other in zip(*matrices, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("scales", ["row", "tensor"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dynamic_int8_reaches_every_form(layout: Layout, shape: Shape, scales: str, seed: int, tmp_path: Path) -> None:
    shape = replace(shape, layout=layout)
    path = write(tmp_path / "source.onnx", shape, seed)
    graph = canonical(path)
    result = rewritten(graph, DynamicInt8.model_validate({"scales": scales}))
    assert result.changed == shape.products and not result.left
    stored = bytes_on_disk(graph, tmp_path)
    assert stored < 0.4 * shape.ffn_bytes
    assert 0.25 * shape.ffn_bytes <= result.details["ffn_bytes"] <= stored
    x = shape.states(seed)
    assert error(answers(tmp_path / "model.onnx", x), answers(path, x)) < 0.1


@pytest.mark.parametrize("scales", ["row", "tensor"])
def test_dynamic_int8_reaches_weights_behind_casts_and_transposes(scales: str, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((48, 64)) / 8).astype(np.float16)  # read as [64, 48] by one layer, [48, 64] by the other
    nodes = [
        helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["wide"], ["turned"], perm=[1, 0]),
        helper.make_node("Transpose", ["turned"], ["back"]),
        helper.make_node("MatMul", ["x0", "turned"], ["a"]),
        helper.make_node("MatMul", ["a", "back"], ["b"]),
        helper.make_node("Gemm", ["b", "wide"], ["c"], transB=1),
        helper.make_node("Gemm", ["c", "turned", "bias"], ["y"], transB=1),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 64]) for name in ("x0", "y"))
    tensors = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.ones(64, np.float32), "bias")]
    graph = helper.make_graph(nodes, "net", [x], [y], tensors)
    path = tmp_path / "source.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    rewritten_graph = canonical(path)
    result = rewritten(rewritten_graph, DynamicInt8.model_validate({"scales": scales}))
    assert result.changed == 4 and not result.left
    assert bytes_on_disk(rewritten_graph, tmp_path) < 2.5 * w.size  # one int8 matrix for each way to read it
    states = rng.standard_normal((9, 64)).astype(np.float32)
    assert error(answers(tmp_path / "model.onnx", states), answers(path, states)) < 0.1


def test_training_computes_with_shared_integers_as_the_runtime_does(tmp_path: Path, seed: int) -> None:
    shape = Shape(layers=3)
    graph = canonical(write(tmp_path / "source.onnx", shape, seed))
    for bits in (4, 8):
        one = canonical(tmp_path / "source.onnx")
        rewritten(one, WeightOnly.model_validate({"bits": bits}))
        for dense, ours in zip(find_anatomy(graph).ffns[0].linears, find_anatomy(one).ffns[0].linears, strict=True):
            node = ours.quantized
            assert node is not None and node.op == "MatMulNBits"
            x = torch.randn(5, dense.in_features, generator=torch.Generator().manual_seed(seed))
            parts = [torch.from_numpy(np.array(values(t))) for t in node.inputs[1:3]]
            got = OPS["com.microsoft", "MatMulNBits"](x, *parts, **node.attrs).numpy()
            np.testing.assert_allclose(got, x.numpy() @ ours.w(), rtol=1e-4, atol=1e-5)
            assert error(got, x.numpy() @ dense.w()) < (0.15 if bits == 4 else 0.02)


@pytest.mark.parametrize("scales", ["row", "tensor"])
def test_dynamic_int8_names_what_stays_in_float(scales: str, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((32, 32)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="plain"),
        helper.make_node("MatMul", ["w", "a"], ["b"], name="left operand"),
        helper.make_node("MatMul", ["b", "x"], ["c"], name="no weight"),
        helper.make_node("Gemm", ["c", "w"], ["d"], name="scaled", alpha=0.5),
        helper.make_node("Cast", ["d"], ["d64"], to=TensorProto.DOUBLE),
        helper.make_node("MatMul", ["d64", "w64"], ["e"], name="wide"),
        helper.make_node("Cast", ["e"], ["y"], to=TensorProto.FLOAT),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [32, 32]) for name in "xy")
    held_out = {"w": w, "w64": w.astype(np.float64)}
    tensors = [numpy_helper.from_array(value, name) for name, value in held_out.items()]
    graph = helper.make_graph(nodes, "net", [x], [y], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    result = rewritten(canonical(tmp_path / "m.onnx"), DynamicInt8.model_validate({"scales": scales}))
    reasons = {left.where: left.why for left in result.left}
    assert result.changed == 1 and reasons.keys() == {"left operand", "scaled", "wide"}
    assert result.details["float_products"] == 4
    for where, why in (("left operand", "left operand"), ("scaled", "alpha"), ("wide", "float64")):
        assert why in reasons[where]


def test_static_int8_stores_integers_once(seed: int, tmp_path: Path) -> None:
    shape = Shape(layers=4, groups=2, layout="transposed copies")
    path = write(tmp_path / "source.onnx", shape, seed)
    graph = canonical(path)
    result = rewritten(graph, StaticInt8(), seed)
    assert result.changed == 4
    assert bytes_on_disk(graph, tmp_path) < 0.35 * shape.ffn_bytes
    assert 0.25 * shape.ffn_bytes < result.details["ffn_bytes"] <= bytes_on_disk(graph, tmp_path)
    ops = optimised(tmp_path / "model.onnx", tmp_path)
    assert (
        sum(op in ("QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "QGemm") for op in ops) == shape.products
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_topk_reads_the_same_rows_in_every_layer(layout: Layout, seed: int, tmp_path: Path) -> None:
    shape = Shape(layers=4, groups=2, layout=layout)
    path = write(tmp_path / "source.onnx", shape, seed)
    graph = canonical(path)
    result = rewritten(graph, FFNTopK(density=1), seed)
    assert result.changed == 4 and result.details["ffn_bytes"] == shape.ffn_bytes
    assert bytes_on_disk(graph, tmp_path) < 1.1 * shape.ffn_bytes
    x = shape.states(seed)
    np.testing.assert_allclose(answers(tmp_path / "model.onnx", x), answers(path, x), rtol=1e-4, atol=1e-4)


def test_topk_reads_shared_rows_under_biases_of_their_own(seed: int, tmp_path: Path) -> None:
    shape = Shape(layers=4, own_biases=True)
    graph = canonical(write(tmp_path / "source.onnx", shape, seed))
    assert rewritten(graph, FFNTopK(density=1), seed).details["ffn_bytes"] == shape.ffn_bytes
    assert bytes_on_disk(graph, tmp_path) < 1.1 * shape.ffn_bytes


@pytest.mark.parametrize("form", ["fp32", "int8", "int4"])
def test_topk_has_one_predictor_for_all_layers(form: str, seed: int, tmp_path: Path) -> None:
    shape = Shape(layers=5, activation="Relu", neurons=160)
    graph = canonical(write(tmp_path / "source.onnx", shape, seed))
    step = FFNTopK.model_validate({"density": 0.3, "take": 0.5, "rank": 32, "form": form, "dense_above": 0, "most": 1})
    result = rewritten(graph, step, seed)
    rows = result.details["layers"]
    assert result.changed == 5 and [row.get("weights_of") for row in rows] == [None, 0, 0, 0, 0]
    predictor = rows[0]["predictor_bytes"]
    assert sum(row["bytes"] for row in rows) == shape.ffn_bytes + predictor == result.details["ffn_bytes"]
    assert bytes_on_disk(graph, tmp_path) < 1.02 * (shape.ffn_bytes + predictor) + 4000
    ops = optimised(tmp_path / "model.onnx", tmp_path)
    assert ops.count("MatMulNBits") == (0 if form == "fp32" else 10) and "DequantizeLinear" not in ops
    x = shape.states(seed)
    assert np.isfinite(answers(tmp_path / "model.onnx", x)).all()


def test_inspect_counts_each_weight_once(seed: int, tmp_path: Path) -> None:
    shape = Shape(layers=6, layout="copied")
    anatomy = find_anatomy(canonical(write(tmp_path / "source.onnx", shape, seed)))
    ffn = describe(anatomy)["parts"][0]
    assert ffn["params"] <= anatomy.params and 4 * ffn["params"] == ffn["bytes_per_token"]
    assert ffn["flops_per_token"] == 2 * shape.products * shape.width * shape.neurons
    assert ffn["bytes_per_token"] == distinct_bytes(m for f in anatomy.ffns for m in f.linears)


@pytest.mark.parametrize(
    ("family", "exporter"), [("gpt2", "dynamo"), ("gpt2", "torchscript"), ("gemma", "torchscript")]
)
def test_a_tied_head_is_the_table(family: str, exporter: str, tmp_path: Path) -> None:
    path = zoo.exported(family, exporter)
    graph = canonical(path)
    anatomy = find_anatomy(graph)
    assert anatomy.head is not None and anatomy.head.linears[-1].weight is anatomy.head.table
    table = stored_bytes(anatomy.head.table)
    dense = bytes_on_disk(graph, tmp_path)
    exact = canonical(path)
    take = anatomy.head.linears[-1].out_features
    result = run_passes(exact, [HeadTopK(take=take)], PassContext(head_profile(exact)))[0]
    assert result.changed == 1 and result.details["table_bytes"] == table
    assert bytes_on_disk(exact, tmp_path) < dense + 0.5 * table
    result = rewritten(graph, WeightOnly(bits=8, parts=("head",), block=16))
    if result.changed:
        assert result.details["float_bytes_kept"] == table
    feeds = zoo.feeds(family, 2, 9, np.random.default_rng(0))
    runs = [session(p) for p in (path, tmp_path / "model.onnx")]
    want, got = (run.run(None, {i.name: feeds[i.name] for i in run.get_inputs()})[0] for run in runs)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
