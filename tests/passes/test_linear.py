"""Every way to write y = x W + b is one Linear, and W is what the runtime multiplies with."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from seeds import seeded

from trimtab.passes.graph import constant
from trimtab.passes.graph.linear import Linear, match_linear

IN, OUT = 64, 24


def built(body: str, constants: dict[str, np.ndarray | onnx.TensorProto]) -> tuple[gs.Graph, onnx.ModelProto]:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
        f"agraph (float[N, {IN}] x) => (float[N, {OUT}] y) {{ {body} }}"
    )
    for name, value in constants.items():
        tensor = value if isinstance(value, onnx.TensorProto) else onnx.numpy_helper.from_array(value)
        tensor.name = name
        model.graph.initializer.append(tensor)
    return gs.import_onnx(model), model


def check(body: str, constants: dict[str, np.ndarray | onnx.TensorProto], *, tolerance: float = 1e-4) -> Linear:
    """The one Linear of the graph computes what ONNX Runtime does."""
    graph, model = built(body, constants)
    found = [linear for node in graph.nodes if (linear := match_linear(node)) is not None]
    assert len(found) == 1
    linear = found[0]
    assert (linear.in_features, linear.out_features) == (IN, OUT)
    assert linear.x is graph.inputs[0]
    assert linear.y is graph.outputs[0]
    assert linear.w().shape == (IN, OUT)
    bias = linear.b()
    assert linear.params == IN * OUT + (0 if bias is None else OUT)
    x = seeded().standard_normal((5, IN), np.float32)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # fusions may round x to int8
    (want,) = ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})
    got = x.astype(np.float64) @ linear.w().astype(np.float64) + (0 if bias is None else bias)
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)
    return linear


def weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"w": rng.standard_normal((IN, OUT), np.float32), "b": rng.standard_normal(OUT, np.float32)}


@pytest.mark.parametrize(
    ("body", "transposed", "nodes"),
    [
        ("y = MatMul (x, w)", False, 1),
        ("p = MatMul (x, w) y = Add (p, b)", False, 2),
        ("p = MatMul (x, w) y = Add (b, p)", False, 2),
        ("t = Transpose <perm = [1, 0]> (w) p = MatMul (x, t) y = Add (p, b)", True, 3),
        ("t = Transpose (w) y = MatMul (x, t)", True, 2),
        ("y = Gemm (x, w, b)", False, 1),
        ("y = Gemm <transB = 1> (x, w, b)", True, 1),
        ("p = Gemm <transB = 1> (x, w) y = Add (p, b)", True, 2),
        ("c = Cast <to = 1> (w) y = MatMul (x, c)", False, 2),
        ("c = Cast <to = 1> (w) t = Transpose <perm = [1, 0]> (c) y = MatMul (x, t)", True, 3),
    ],
)
def test_forms(body: str, transposed: bool, nodes: int) -> None:
    held = weights(seeded())
    if transposed:
        held["w"] = held["w"].T.copy()
    if "Cast" in body:
        held["w"] = held["w"].astype(np.float16)
    linear = check(body, held)
    assert linear.transposed == transposed
    assert len(linear.nodes) == nodes
    assert (linear.bias is not None) == ("b)" in body or "(b" in body)
    assert linear.bytes == held["w"].nbytes + (held["b"].nbytes if linear.bias is not None else 0)


@pytest.mark.parametrize(
    "body",
    [
        "y = MatMul (x, v)",
        "p = Mul (x, x) y = MatMul (w, p)",
        "y = Gemm <alpha = 0.5> (x, w, b)",
        "y = Gemm <beta = 0.5> (x, w, b)",
        "y = Gemm <transA = 1> (x, w, b)",
        "y = Add (x, w)",
    ],
)
def test_what_is_no_linear(body: str) -> None:
    graph, _ = built("v = Relu (x) " + body, weights(seeded()))
    assert not [node for node in graph.nodes if match_linear(node)]


def test_a_product_used_twice_keeps_its_bias_outside() -> None:
    graph, _ = built("p = MatMul (x, w) q = Add (p, b) y = Mul (p, q)", weights(seeded()))
    linear = match_linear(graph.nodes[0])
    assert linear is not None
    assert linear.bias is None
    assert linear.y.name == "p"


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_dequantized_int8(axis: int | None) -> None:
    rng = seeded()
    size = () if axis is None else (IN, OUT)[axis]
    held = {
        "q": rng.integers(-128, 128, (IN, OUT)).astype(np.int8),
        "s": rng.uniform(0.01, 0.1, size).astype(np.float32),
        "z": rng.integers(-9, 9, size).astype(np.int8),
        "b": rng.standard_normal(OUT, np.float32),
    }
    attribute = "" if axis is None else f"<axis = {axis}>"
    linear = check(f"w = DequantizeLinear {attribute} (q, s, z) p = MatMul (x, w) y = Add (p, b)", held)
    assert linear.quantized is not None
    assert linear.bytes == sum(value.nbytes for value in held.values())


def test_dequantized_int4_blocks() -> None:
    rng = seeded()
    q = onnx.helper.make_tensor("q", onnx.TensorProto.INT4, (IN, OUT), rng.integers(-8, 8, (IN, OUT)).flatten())
    scale = rng.uniform(0.01, 0.1, (IN // 16, OUT)).astype(np.float32)
    linear = check("w = DequantizeLinear <axis = 0, block_size = 16> (q, s) y = MatMul (x, w)", {"q": q, "s": scale})
    assert linear.bytes == IN * OUT // 2 + scale.nbytes


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_matmul_nbits(bits: int, zeros: bool) -> None:
    rng = seeded()
    blocks = IN // 32
    held: dict[str, np.ndarray] = {
        "q": rng.integers(0, 256, (OUT, blocks, 32 * bits // 8)).astype(np.uint8),
        "s": rng.uniform(0.01, 0.1, (OUT, blocks)).astype(np.float32),
    }
    if zeros:
        held["z"] = rng.integers(0, 256, (OUT, -(-blocks * bits // 8))).astype(np.uint8)
    attributes = f"<K = {IN}, N = {OUT}, bits = {bits}, block_size = 32>"
    linear = check(
        f"y = com.microsoft.MatMulNBits {attributes} (x, q, s{', z' if zeros else ''})", held, tolerance=1e-3
    )
    assert linear.transposed
    assert linear.bytes == sum(value.nbytes for value in held.values())


def test_a_constant_input_is_folded_elsewhere() -> None:
    node = gs.Node("MatMul", inputs=[constant("a", np.ones((2, 3))), constant("w", np.ones((3, 4)))])
    node.outputs = [gs.Variable("y")]
    assert match_linear(node) is None
