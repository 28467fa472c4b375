"""dynamic-int8: by tensors what ONNX Runtime's quantizer does to a dense graph, by rows the dialect's Int8Linear."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import zoo
from seeds import seeded

from trimtab.compiler.targets import get_target
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner
from trimtab.passes import Capability, PassContext, pass_class, run_passes
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.canonicalize import Canonicalize
from trimtab.passes.contract import PassResult
from trimtab.passes.dynamic_int8 import DynamicInt8
from trimtab.passes.graph import load_graph, save_graph, values

PRODUCTS = {"row": "Int8Linear", "tensor": "MatMulInteger"}


def quantized(path: Path, to: Path, scales: str, **capability: bool) -> tuple[gs.Graph, PassResult]:
    """The graph as `to` has it, and what the pass did."""
    graph = load_graph(path)
    step = DynamicInt8.model_validate({"scales": scales})
    result = run_passes(graph, [Canonicalize(), step], PassContext(capability=Capability(**capability)))[1]
    save_graph(graph, to)
    return load_graph(to), result


def answers(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    run = OnnxRuntimeRunner(path)
    return run.run({name: feeds[name] for name in run.inputs})[run.outputs[0]]


@pytest.mark.parametrize("scales", PRODUCTS)
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit"])
def test_products_become_integer_products(family: str, scales: str, tmp_path: Path) -> None:
    path, seed = zoo.exported(family), int(np.random.default_rng().integers(1 << 30))
    saturates = get_target("onnxruntime").probe().saturates
    graph, result = quantized(path, tmp_path / "int8.onnx", scales, saturates=saturates)
    ops = [node.op for node in graph.nodes]
    products = ops.count(PRODUCTS[scales]) + ops.count("ConvInteger")
    assert result.changed == products > 0 and (family == "vit" or PRODUCTS[scales] in ops)
    print(f"seed {seed}")
    feeds = zoo.feeds(family, 3, 11, np.random.default_rng(seed))
    dense, ours = (answers(p, feeds) for p in (path, tmp_path / "int8.onnx"))
    error = np.linalg.norm(ours - dense) / np.linalg.norm(dense)
    assert 0 < error < 0.1


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_by_rows_a_sample_is_answered_as_alone(family: str, tmp_path: Path) -> None:
    """Whatever else is in the batch. ViT's patches, whose integers would have one scale for all, stay in float."""
    graph, result = quantized(zoo.exported(family), tmp_path / "int8.onnx", "row")
    assert all(node.op not in ("MatMulInteger", "ConvInteger") for node in graph.nodes)
    assert [left.why for left in result.left if "whole batch" in left.why] == (
        ["its integers would have one scale for the whole batch"] if family == "vit" else []
    )
    feeds = zoo.feeds(family, 4, 11, seeded())
    if family == "vit":
        feeds["pixel_values"][1] *= 50
    together = answers(tmp_path / "int8.onnx", feeds)
    for row in range(4):
        alone = answers(tmp_path / "int8.onnx", {name: value[row : row + 1] for name, value in feeds.items()})
        np.testing.assert_allclose(alone[0], together[row], rtol=1e-5, atol=1e-6 * np.abs(together).max())


@pytest.mark.parametrize("scales", PRODUCTS)
def test_a_file_of_an_old_format_whose_weights_are_inputs_too(scales: str, tmp_path: Path) -> None:
    """As files of IR version 3 must have it. The quantizer finds such weights in files of later versions alone."""
    rng = seeded()
    inner, outer = (int(size) for size in rng.integers(20, 90, 2))
    weights = {"w": (inner, outer), "bias": (outer,), "v": (outer, inner)}
    shapes = {"x": ["batch", inner], **{name: list(shape) for name, shape in weights.items()}}
    proto = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", ["x", "w"], ["a"]),
            onnx.helper.make_node("Add", ["a", "bias"], ["b"]),
            onnx.helper.make_node("Relu", ["b"], ["c"]),
            onnx.helper.make_node("MatMul", ["c", "v"], ["y"]),
        ],
        "old",
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", inner])],
        [onnx.numpy_helper.from_array(rng.standard_normal(shape, np.float32), name) for name, shape in weights.items()],
    )
    path = tmp_path / "old.onnx"
    onnx.save(onnx.helper.make_model(proto, opset_imports=[onnx.helper.make_opsetid("", 7)], ir_version=3), path)
    _, result = quantized(path, tmp_path / "int8.onnx", scales)
    assert result.changed == 2
    feeds = {"x": rng.standard_normal((5, inner), np.float32)}
    dense, ours = answers(path, feeds), answers(tmp_path / "int8.onnx", feeds)
    assert 0 < np.linalg.norm(ours - dense) / np.linalg.norm(dense) < 0.1


def test_by_rows_behind_unpad_padding_and_company_change_nothing(tmp_path: Path) -> None:
    """And a batch may be empty, as it is once all samples have left."""
    graph, rng = load_graph(zoo.exported("bert")), seeded()
    run_passes(graph, [Canonicalize(), pass_class("unpad")(), DynamicInt8(scales="row")], PassContext())
    save_graph(graph, tmp_path / "int8.onnx")
    assert not {"MatMul", "MatMulInteger"} & {node.op for node in graph.nodes}
    feeds = zoo.feeds("bert", 4, 11, rng)
    lengths = rng.integers(1, 12, 4)
    feeds["attention_mask"] = (np.arange(11) < lengths[:, None]).astype(np.int64)
    together = answers(tmp_path / "int8.onnx", feeds)
    for row, length in enumerate(lengths):
        own = {name: value[row : row + 1, :length] for name, value in feeds.items()}
        np.testing.assert_allclose(answers(tmp_path / "int8.onnx", own)[0], together[row], rtol=1e-5, atol=1e-6)
    assert answers(tmp_path / "int8.onnx", {name: value[:0] for name, value in feeds.items()}).shape == (0, 3)


def test_auto_is_rows_where_they_have_a_kernel() -> None:
    for row_scales, op in ((True, "Int8Linear"), (False, "MatMulInteger")):
        graph, capability = load_graph(zoo.exported("bert")), Capability(row_scales=row_scales)
        run_passes(graph, [Canonicalize(), DynamicInt8(scales="auto")], PassContext(capability=capability))
        assert {node.op for node in graph.nodes} & {*PRODUCTS.values()} == {op}
        assert DynamicInt8(scales="auto").rounding(capability).per_row == row_scales
        assert DynamicInt8(scales="auto").unfit(capability) is None
        assert (DynamicInt8(scales="row").unfit(capability) is None) == row_scales


@pytest.mark.parametrize("scales", PRODUCTS)
def test_activations_join_their_products(scales: str, tmp_path: Path) -> None:
    """GELU and the pooler's tanh by rows; not where a product's sum is an output, too."""
    left = {"Gelu", "Tanh"} if scales == "tensor" else set()
    graph, _ = quantized(zoo.exported("bert"), tmp_path / "int8.onnx", scales)
    assert {node.op for node in graph.nodes} & {"Gelu", "Tanh", "Erf"} == left
    rng = seeded()
    text = """<ir_version: 10, opset_import: ["" : 17]> g (float[B, 24] x) => (float[B, 8] y, float[B, 32] h) {
        p = MatMul(x, up)  h = Add(p, bias)  a = Relu(h)  z = MatMul(a, down)  y = Sigmoid(z)
    }"""
    model = onnx.parser.parse_model(text)
    shapes = {"up": (24, 32), "bias": (32,), "down": (32, 8)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    arrays["down"] /= 16  # no sum so large that its rounding is much to a sigmoid
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    onnx.save(model, tmp_path / "net.onnx")
    graph, _ = quantized(tmp_path / "net.onnx", tmp_path / "int8.onnx", "row")
    assert [node.op for node in graph.nodes] == ["Int8Linear", "Relu", "Int8Linear"]
    assert [tensor.name for tensor in graph.outputs] == ["y", "h"]
    x = {"x": rng.standard_normal((7, 24)).astype(np.float32)}
    dense, ours = (OnnxRuntimeRunner(tmp_path / f"{name}.onnx").run(x) for name in ("net", "int8"))
    for name in ("y", "h"):
        assert np.linalg.norm(ours[name] - dense[name]) < 0.03 * np.linalg.norm(dense[name])


@pytest.mark.parametrize(("scales", "beside"), [("row", 4 + 4), ("tensor", 4 + 1 + 4)])
def test_ffn_bytes_are_those_of_its_integers(scales: str, beside: int, tmp_path: Path) -> None:
    """Beside them: scale and bias of an output feature, by tensors a zero point as well."""
    graph = load_graph(zoo.exported("bert"))
    run_passes(graph, [Canonicalize()], PassContext())
    ffns = find_anatomy(graph).ffns
    weights = sum(linear.in_features * linear.out_features for ffn in ffns for linear in ffn.linears)
    step = DynamicInt8.model_validate({"scales": scales})
    told = run_passes(graph, [step], PassContext())[0].details["ffn_bytes"]
    channels = sum(linear.out_features for ffn in ffns for linear in ffn.linears)
    assert told == weights + channels * beside


@pytest.mark.parametrize(("saturates", "largest"), [(False, 127), (True, 64)])
def test_weights_take_seven_bits_where_products_saturate(saturates: bool, largest: int) -> None:
    graph = load_graph(zoo.exported("bert"))
    run_passes(graph, [Canonicalize(), DynamicInt8()], PassContext(capability=Capability(saturates=saturates)))
    weights = [values(n.inputs[1]) for n in graph.nodes if n.op == "MatMulInteger"]
    assert max(np.abs(w.astype(int)).max() for w in weights) == pytest.approx(largest, abs=1)


@pytest.mark.parametrize("scales", PRODUCTS)
def test_only_products_with_weights_are_left(scales: str, tmp_path: Path) -> None:
    """`scores` and `context` have none, through whatever ops they are computed; `scaled` has some that are computed."""
    text = """<ir_version: 10, opset_import: ["" : 17]> g (float[B, 24] x) => (float[B, 8] y) {
        q = MatMul(x, w)  k = Transpose <perm = [1, 0]> (q)  scores = MatMul(q, k)  s = Softmax <axis = -1> (scores)
        v = Add(q, shift)  context = MatMul(s, v)
        twice = Mul(up, two)  halved = Div(twice, two)  scaled = MatMul(context, halved)
        turned = Gemm <alpha = 0.5> (scaled, down)  y = Relu(turned)
    }"""
    model = onnx.parser.parse_model(text)
    rng = seeded()
    shapes = {"w": (24, 24), "shift": (24,), "up": (24, 16), "two": (24, 16), "down": (16, 8)}
    arrays = {name: rng.uniform(1, 2, shape).astype(np.float32) for name, shape in shapes.items()}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    onnx.save(model, tmp_path / "net.onnx")
    graph = load_graph(tmp_path / "net.onnx")
    result = DynamicInt8.model_validate({"scales": scales}).run(graph, PassContext())
    assert {left.where: left.why for left in result.left} == {
        "scaled": "its weights are computed", "turned": "a Gemm with alpha, beta or transA",
    }  # fmt: skip
    assert result.details["float_products"] == 4


@pytest.mark.parametrize("scales", PRODUCTS)
@pytest.mark.parametrize("kind", [onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16])
def test_a_model_in_half_precision(kind: int, scales: str, tmp_path: Path) -> None:
    """Its products become integer products, and between them it keeps its type."""
    rng = seeded()
    text = """<ir_version: 10, opset_import: ["" : 18]> g (int64[B, S] ids) => (float[B, S, 8] y) {
        e = Gather(table, ids)  p = MatMul(e, up)  h = Add(p, bias)  a = Relu(h)  z = MatMul(a, down)
        y = Cast<to = 1>(z)
    }"""
    model = onnx.parser.parse_model(text)
    shapes = {"table": (40, 24), "up": (24, 32), "bias": (32,), "down": (32, 8)}
    for key, shape in shapes.items():
        array = rng.standard_normal(shape).astype(onnx.helper.tensor_dtype_to_np_dtype(kind))
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, key))
    onnx.save(model, tmp_path / "half.onnx")
    graph, result = quantized(tmp_path / "half.onnx", tmp_path / "int8.onnx", scales)
    assert result.changed == [node.op for node in graph.nodes].count(PRODUCTS[scales]) == 2
    onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "int8.onnx"), check_type=True)
    assert {node.attrs["to"] for node in graph.nodes if node.op == "Cast"} >= {kind}
    wide = onnx.parser.parse_model(text)
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        wide.graph.initializer.append(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(wide, tmp_path / "wide.onnx")
    ids = {"ids": rng.integers(0, 40, (3, 5))}
    if kind == onnx.TensorProto.BFLOAT16:
        return  # ONNX Runtime's CPU provider has no Relu of it
    dense, ours = answers(tmp_path / "wide.onnx", ids), answers(tmp_path / "int8.onnx", ids)
    assert np.linalg.norm(ours - dense) < 0.05 * np.linalg.norm(dense)


@pytest.mark.parametrize("causal", [0, 1])
def test_onnx_s_own_attention_stays_as_it_is(causal: int, tmp_path: Path) -> None:
    """The quantizer goes by names, and holds it for com.microsoft's, which has weights."""
    rng = seeded()
    text = f"""<ir_version: 11, opset_import: ["" : 23]> g (float[B, S, 12] x) => (float[B, S, 12] y) {{
        q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
        a = Attention<q_num_heads = 3, kv_num_heads = 3, is_causal = {causal}>(q, k, v)  y = MatMul(a, wo)
    }}"""
    model = onnx.parser.parse_model(text)
    for key in ("wq", "wk", "wv", "wo"):
        array = rng.standard_normal((12, 12)).astype(np.float32) / 3
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, key))
    onnx.save(model, tmp_path / "dense.onnx")
    graph, result = quantized(tmp_path / "dense.onnx", tmp_path / "int8.onnx", "tensor")
    assert result.changed == 4 and "Attention" in {node.op for node in graph.nodes}
    x = {"x": rng.standard_normal((2, 6, 12)).astype(np.float32)}
    dense, ours = answers(tmp_path / "dense.onnx", x), answers(tmp_path / "int8.onnx", x)
    assert np.linalg.norm(ours - dense) < 0.05 * np.linalg.norm(dense)


@pytest.mark.parametrize("scales", PRODUCTS)
def test_half_precision_reports_the_same_ffn_bytes(scales: str) -> None:
    """By tensors, biases stay as they are, in half precision."""
    rng = seeded()
    d_model, d_ff = (int(size) for size in rng.integers(8, 40, 2))
    text = f"""<ir_version: 10, opset_import: ["" : 18]> g (TYPE[B, S, {d_model}] x) => (TYPE[B, S, {d_model}] y) {{
        h = MatMul(x, up)  hb = Add(h, bias)  a = Relu(hb)  z = MatMul(a, down)  y = Add(x, z)
    }}"""
    shapes = {"up": (d_model, d_ff), "bias": (d_ff,), "down": (d_ff, d_model)}
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    reported = {}
    for kind, dtype in (("float", np.float32), ("float16", np.float16)):
        model = onnx.parser.parse_model(text.replace("TYPE", kind))
        for name, array in arrays.items():
            model.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(dtype), name))
        graph = gs.import_onnx(onnx.shape_inference.infer_shapes(model))
        reported[kind] = DynamicInt8.model_validate({"scales": scales}).run(graph, PassContext()).details["ffn_bytes"]
    narrower = 2 * d_ff if scales == "tensor" else 0
    assert reported["float16"] == reported["float"] - narrower > 2 * d_model * d_ff


def test_a_half_precision_product_left_in_float_has_its_own_name() -> None:
    """A weight on the left is not rounded."""
    rng = seeded()
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18]> g (float16[B, 12, 8] x) => (float16[B, 8, 6] y) {
            left = MatMul(mixer, x)  y = MatMul(left, w)
        }"""
    )
    for name, shape in {"mixer": (8, 12), "w": (8, 6)}.items():
        array = rng.standard_normal(shape).astype(np.float16)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    graph = gs.import_onnx(onnx.shape_inference.infer_shapes(model))
    result = DynamicInt8().run(graph, PassContext())
    assert [left.where for left in result.left] == ["left"]
