"""Half precision in the graph: types as promised, errors as half precision has them, range where it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from half import parsed as model
from onnx import TensorProto
from rewrite import canonical, profile_of, session
from seeds import seeded
from zoo import FAMILIES, exported, feeds

from trimtab.passes import Capability, PassContext, pass_class, run_passes
from trimtab.passes.graph import load_graph, save_graph
from trimtab.passes.lower import lower
from trimtab.passes.precision import Precision
from trimtab.passes.precision.precision import narrowed
from trimtab.plugins import KEEP_TOKENS, PACKED_ATTENTION, add_multi_output_node, add_node

GPU = Capability(float16=True)


def saved(graph: Any, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_graph(graph, folder / "model.onnx")
    return folder / "model.onnx"


def in_half(graph: Any, capability: Capability = GPU, **options: Any) -> Any:
    (result,) = run_passes(graph, [Precision.model_validate(options)], PassContext(capability=capability))
    return result


def types(path: Path) -> dict[str, set[int]]:
    """Op → types of its outputs, as ONNX infers them."""
    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    known = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}
    found: dict[str, set[int]] = {}
    for node in model.graph.node:
        found.setdefault(node.op_type, set()).update(known[name] for name in node.output if name in known)
    return found


def worst(before: Path, after: Path, family: str, shapes: tuple[tuple[int, int], ...] = ((1, 5), (3, 9))) -> float:
    """Of the largest output of many inputs: those of one alone may happen to be small."""
    rng, one, two = seeded(), session(before), session(after)
    sizes = [np.abs(output).max() for output in one.run(None, feeds(family, 24, 9, rng))]
    errors = []
    for batch, tokens in shapes:
        given = feeds(family, batch, tokens, rng)
        for want, got, size in zip(one.run(None, given), two.run(None, given), sizes, strict=True):
            assert got.dtype == np.float32 and got.shape == want.shape
            errors.append(float(np.abs(got - want).max() / size))
    return max(errors)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_half(tmp_path: Path, family: str) -> None:
    graph = canonical(exported(family))
    before = saved(graph, tmp_path / "a")
    result = in_half(graph)
    after = saved(graph, tmp_path / "b")
    assert 1e-7 < worst(before, after, family) < 5e-3
    assert types(after)["MatMul"] - {0} == {TensorProto.FLOAT16} or family == "llama"
    assert result.changed > 20
    weights = [t.data_type for t in onnx.load(str(after)).graph.initializer if np.prod(t.dims) >= 1024]
    assert set(weights) == {TensorProto.FLOAT16}


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_other_exporters(tmp_path: Path, family: str) -> None:
    graph = canonical(exported(family, "torchscript"))
    before = saved(graph, tmp_path / "a")
    in_half(graph)
    assert 1e-7 < worst(before, saved(graph, tmp_path / "b"), family) < 5e-3


def test_float32_changes_nothing(tmp_path: Path) -> None:
    graph = canonical(exported("bert"))
    before = saved(graph, tmp_path / "a").read_bytes()
    assert in_half(graph, type="float32").changed == 0
    assert saved(graph, tmp_path / "b").read_bytes() == before


def test_inputs_and_outputs_keep_their_types_unless_told(tmp_path: Path) -> None:
    for io, wanted in ((False, TensorProto.FLOAT), (True, TensorProto.FLOAT16)):
        graph = canonical(exported("llama", "cached"))
        in_half(graph, io=io)
        model = onnx.load(str(saved(graph, tmp_path / str(io))))
        sides = [t for t in (*model.graph.input, *model.graph.output) if t.name not in ("input_ids", "attention_mask")]
        assert {t.type.tensor_type.elem_type for t in sides} == {wanted}
        session(tmp_path / str(io) / "model.onnx")


@pytest.mark.parametrize(
    "passes",
    [
        {"weight-only": {"bits": 8}},
        {"weight-only": {"bits": 4, "block": 16}},
        {"ffn-split": {}},
        {"ffn-topk": {"density": 0.2, "take": 0.3, "recall": 0.01, "dense_above": 3}},
        {"ffn-topk": {"density": 0.2, "take": 0.3, "recall": 0.01, "block": 4, "weights": "int8", "common": 0.1}},
        {"dynamic-int8": {}},
    ],
    ids=lambda p: "+".join(p),
)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_it_stands_behind_every_pass(tmp_path: Path, family: str, passes: dict[str, dict[str, Any]]) -> None:
    graph = canonical(exported(family))
    steps = [pass_class(name).model_validate(options) for name, options in passes.items()]
    run_passes(graph, steps, PassContext(profile_of(graph)))
    before = saved(graph, tmp_path / "a")
    in_half(graph, Capability())  # a CPU: its kernels of the dialect take float32
    assert worst(before, saved(graph, tmp_path / "b"), family) < 1e-2


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
def test_the_dialect_in_half_where_the_target_computes_it(tmp_path: Path, weights: str) -> None:
    graph = canonical(exported("llama"))
    topk = {"density": 0.3, "take": 0.4, "recall": 0.01, "dense_above": 0, "weights": weights}
    run_passes(graph, [pass_class("ffn-topk").model_validate(topk)], PassContext(profile_of(graph)))
    before = saved(graph, tmp_path / "a")
    in_half(graph)
    ups = [node for node in graph.nodes if node.op == "SparseUp"]
    assert ups and all(np.dtype(node.outputs[0].dtype) == np.float16 for node in ups)
    lower(graph)
    assert worst(before, saved(graph, tmp_path / "b"), "llama") < 5e-3


def test_what_an_op_declares_as_float_stays(tmp_path: Path) -> None:
    """What tokens receive is summed and compared in float32; outputs that a node leaves unnamed get no type."""
    x, offsets, threshold = (
        gs.Variable(name, kind, shape)
        for name, kind, shape in (("x", np.float32, ["t", 16]), ("o", np.int32, ["b"]), ("s", np.float32, [1]))
    )
    graph = gs.Graph(inputs=[x, offsets, threshold], opset=21, ir_version=10)
    rng = seeded()
    q = gs.Variable("q", np.float32, ["t", 16])
    graph.nodes.append(gs.Node("MatMul", inputs=[x, gs.Constant("w", rng.random((16, 16), np.float32))], outputs=[q]))
    given = {"q": q, "k": q, "v": q, "offsets": offsets}
    context = add_node(graph, PACKED_ATTENTION, given, "first", heads=2)
    _, received = add_multi_output_node(graph, PACKED_ATTENTION, given | {"q": context}, "second", heads=2)
    tokens = {"importance": received, "offsets": offsets, "threshold": threshold}
    graph.outputs = [*add_multi_output_node(graph, KEEP_TOKENS, tokens, "keep")]
    before = saved(graph, tmp_path / "before")
    half = load_graph(before)
    in_half(half)
    after = saved(half, tmp_path / "after")
    kinds = {node.name: [t.dtype for t in (*node.inputs, *node.outputs)] for node in half.nodes if node.domain}
    assert kinds["second"][0] == kinds["second"][-2] == np.float16 and kinds["second"][-1] == np.float32
    assert kinds["keep"] == [np.float32, np.int32, np.float32, np.int32, np.int32]
    feeds = {"x": rng.random((9, 16), np.float32), "o": np.array([0, 4, 9], np.int32), "s": np.ones(1, np.float32)}
    for path in (before, after):  # by the bodies, as native kernels take float32 alone
        assert ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)[1].shape == (3,)


def test_statistics_of_a_norm_stay_in_float32(tmp_path: Path) -> None:
    """Spelt out, as older exporters do: squares beyond half precision, and an epsilon below it."""
    graph = model(
        """g (float[n, 64] x) => (float[n, 64] y) {
        square = Pow (x, two)  mean = ReduceMean <keepdims = 1> (square, last)  more = Add (mean, epsilon)
        root = Sqrt (more)  y = Div (x, root) }""",
        two=np.array(2, np.float32), last=np.array([-1]), epsilon=np.array(1e-9, np.float32),
    )  # fmt: skip
    in_half(graph)
    run = session(saved(graph, tmp_path))
    x = np.full((2, 64), 1000, np.float32)
    np.testing.assert_allclose(run.run(None, {"x": x})[0], 1, rtol=2e-3)
    assert {node.op for node in graph.nodes if node.op == "Add" and node.outputs[0].dtype == np.float32} == {"Add"}


def test_angles_of_positions_stay_in_float32(tmp_path: Path) -> None:
    graph = model(
        """g (int64[n, 1] p, float[n, 8] x) => (float[n, 8] y) {
        f = Cast <to = 1> (p)  a = Mul (f, w)  c = Cos (a)  y = Mul (x, c) }""",
        w=np.linspace(0.5, 1, 8, dtype=np.float32),
    )
    before = saved(graph, tmp_path / "a")
    in_half(graph)
    given = {"p": np.array([[30001], [4099]]), "x": np.ones((2, 8), np.float32)}
    got = session(saved(graph, tmp_path / "b")).run(None, given)[0]
    np.testing.assert_allclose(got, session(before).run(None, given)[0], atol=1e-3)  # half has no 4099


def test_masks_stay_finite_and_large_weights_stay(tmp_path: Path) -> None:
    least = np.finfo(np.float32).min
    assert np.isfinite(2 * narrowed(np.array([least, 1], np.float32), np.dtype(np.float16))).all()
    assert np.isneginf(narrowed(np.array([-np.inf]), np.dtype(np.float16))).all()
    graph = model(
        """g (float[n, 8] x, bool[n, 8] m) => (float[n, 8] y, float[n, 8] z) {
        o = Where (m, zero, least)  a = Add (x, o)  b = Add (a, o)  y = Softmax (b)  z = Mul (x, big) }""".replace(
            ")  ", ")\n"
        ),
        zero=np.array(0, np.float32), least=np.array(least), big=np.array(1e6, np.float32),
    )  # fmt: skip
    in_half(graph)
    run = session(saved(graph, tmp_path))
    x = seeded().normal(size=(3, 8)).astype(np.float32)
    y, z = run.run(None, {"x": x, "m": np.zeros((3, 8), bool)})
    assert np.isfinite(y).all() and np.allclose(y.sum(1), 1, atol=1e-2)
    np.testing.assert_allclose(z, 1e6 * x, rtol=2e-3)


def test_scales_stay_positive(tmp_path: Path) -> None:
    """Blocks of zeros have the least of scales, which half precision has not; TensorRT refuses 0."""
    graph = model("g (float[n, 64] x) => (float[n, 8] y) { y = MatMul (x, w) }", w=np.zeros((64, 8), np.float32))
    from trimtab.passes.matrices.quantize import round_to_nearest

    matmul = graph.nodes[0]
    made = round_to_nearest(np.zeros((64, 8), np.float32), 8, 32).emit(
        graph, graph.inputs[0], "w", np.dtype(np.float32)
    )
    matmul.outputs.clear()
    graph.outputs, made.shape = [made], ["n", 8]
    graph.opset = 21
    in_half(graph)
    found = onnx.load(str(saved(graph, tmp_path)))
    scale = next(t for t in found.graph.initializer if t.data_type == TensorProto.FLOAT16)
    assert (onnx.numpy_helper.to_array(scale) > 0).all()


def test_ops_that_are_asked_to_stay(tmp_path: Path) -> None:
    graph = canonical(exported("bert"))
    in_half(graph, keep=["Softmax", "LayerNormalization"])
    found = types(saved(graph, tmp_path))
    assert found["Softmax"] == found["LayerNormalization"] == {TensorProto.FLOAT}
    assert TensorProto.FLOAT16 in found["MatMul"]


def test_bfloat16(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime's CPU has no kernels for it: ONNX's own evaluator runs a small graph."""
    rng = seeded()
    capfd.readouterr()  # the seed
    w = rng.normal(size=(16, 8)).astype(np.float32)
    graph = model("g (float[n, 16] x) => (float[n, 8] y) { h = MatMul (x, w) \n y = Relu (h) }", w=w)
    in_half(graph, type="bfloat16")
    path = saved(graph, tmp_path)
    assert types(path)["MatMul"] == {TensorProto.BFLOAT16}
    x = rng.normal(size=(3, 16)).astype(np.float32)
    (y,) = onnx.reference.ReferenceEvaluator(str(path)).run(None, {"x": x})
    assert y.dtype == np.float32
    want = np.maximum(x.astype(ml_dtypes.bfloat16).astype(float) @ w.astype(ml_dtypes.bfloat16).astype(float), 0)
    np.testing.assert_allclose(y, want, atol=0.1)
    graph = canonical(exported("llama", "cached"))
    in_half(graph, type="bfloat16", io=True)
    onnx.checker.check_model(str(saved(graph, tmp_path / "b")))
    assert lower(load_graph(tmp_path / "b" / "model.onnx"))["GroupQueryAttention"] == 2
    assert capfd.readouterr().out == ""  # of a type that numpy lacks


def test_a_recipe_writes_it() -> None:
    from trimtab.compiler.recipe import load_recipe

    recipe = load_recipe({"passes": [{"precision": {"type": "bfloat16"}}]})
    assert recipe.passes[0] == Precision(type="bfloat16")
    assert load_recipe({"passes": ["precision"]}).passes[0] == Precision(type="float16")
