"""Activations are known by what they compute, whichever ops they are written in."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
import torch
from seeds import seeded

from trimtab.passes.anatomy.activation import KNOWN, evaluate, find_gate, is_elementwise, is_linear, name_of

WRITTEN = {
    "gelu": [
        "y = Gelu (x)",
        "a = Div (x, sqrt2) b = Erf (a) c = Add (b, one) d = Mul (x, c) y = Mul (d, half)",
        "a = Mul (x, half) b = Mul (x, rsqrt2) c = Erf (b) d = Add (one, c) y = Mul (a, d)",
        "y = com.microsoft.Gelu (x)",
    ],
    "gelu_tanh": [
        'y = Gelu <approximate = "tanh"> (x)',
        "y = com.microsoft.FastGelu (x)",
        "a = Pow (x, three) b = Mul (a, cubic) c = Add (x, b) d = Mul (c, root) e = Tanh (d) f = Add (e, one) "
        "g = Mul (x, half) y = Mul (g, f)",
        "a = Mul (x, x) b = Mul (a, x) c = Mul (cubic, b) d = Add (c, x) e = Mul (root, d) f = Tanh (e) g = Mul (x, f) "
        "h = Add (x, g) y = Mul (half, h)",
    ],
    "quick_gelu": ["a = Mul (x, quick) b = Sigmoid (a) y = Mul (x, b)", "y = com.microsoft.QuickGelu (x)"],
    "relu": [
        "y = Relu (x)",
        "y = Max (x, zero)",
        "a = Max (x) b = Min (x, a, x) y = Max (zero, b, a)",
        "y = Clip (x, zero)",
        "a = Identity (x) y = Relu (a)",
    ],
    "silu": [
        "a = Sigmoid (x) y = Mul (x, a)",
        "a = Neg (x) b = Exp (a) c = Add (b, one) y = Div (x, c)",
        "y = com.microsoft.QuickGelu <alpha = 1.0> (x)",
    ],
    "relu_squared": ["a = Relu (x) y = Mul (a, a)", "a = Relu (x) y = Pow (a, two)"],
    "sigmoid": ["y = Sigmoid (x)"],
    "tanh": ["y = Tanh (x)"],
    "softplus": ["y = Softplus (x)"],
    "mish": ["a = Softplus (x) b = Tanh (a) y = Mul (x, b)", "y = Mish (x)"],
    "elu": ["y = Elu (x)"],
    "hard_swish": ["y = HardSwish (x)", "a = HardSigmoid <alpha = 0.16666667> (x) y = Mul (x, a)"],
    "unknown": [
        "a = Sigmoid (x) b = Mul (x, a) y = Clip (b, bottom, top)",
        "a = Relu (x) y = Min (a, top)",
        "a = Min (x, a_million) b = Gelu (a) y = Identity (b)",
        "y = LeakyRelu (x)",
        "y = Elu <alpha = 0.5> (x)",
        "a = Relu (x) y = Mul (a, half)",
        "y = Abs (x)",
    ],
}
CASES = [(name, text) for name, texts in WRITTEN.items() for text in texts]
SCALARS = {
    "zero": 0, "half": 0.5, "one": 1, "two": 2, "three": 3, "sqrt2": 2**0.5, "rsqrt2": 0.5**0.5, "quick": 1.702,
    "cubic": 0.044715, "root": (2 / np.pi) ** 0.5, "bottom": -40, "top": 40, "a_million": 1e6,
}  # fmt: skip


def parsed(text: str, inputs: str = "float[N] x") -> tuple[list[gs.Node], onnx.ModelProto, gs.Graph]:
    constants = ", ".join(f"float {name} = {{{value}}}" for name, value in SCALARS.items())
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20, "com.microsoft" : 1]>'
        f"agraph ({inputs}) => (float[N] y) <{constants}> {{ {text} }}"
    )
    graph = gs.import_onnx(model)
    return graph.nodes, model, graph


@pytest.mark.parametrize(("name", "text"), CASES)
def test_every_way_to_write_it(name: str, text: str) -> None:
    nodes, _, graph = parsed(text)
    assert all(is_elementwise(node) for node in nodes)

    def function(x: np.ndarray) -> np.ndarray:
        return evaluate(nodes, {id(graph.inputs[0]): x}, graph.outputs[0])

    assert name_of(function) == name
    assert not is_linear(function)


@pytest.mark.parametrize(
    "text", [text for _, text in CASES] + ["y = Selu (x)", "y = ThresholdedRelu (x)", "y = Softsign (x)"]
)
def test_evaluation_is_that_of_onnxruntime(text: str) -> None:
    import onnxruntime as ort

    nodes, model, graph = parsed(text)
    x = seeded().normal(0, 3, 1000).astype(np.float32)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    (want,) = ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})
    got = evaluate(nodes, {id(graph.inputs[0]): x.astype(np.float64)}, graph.outputs[0])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_known_functions_are_torch_s() -> None:
    x = torch.linspace(-9, 9, 999, dtype=torch.float64)
    functional = torch.nn.functional
    for name, function in {
        "gelu": functional.gelu,
        "gelu_tanh": lambda t: functional.gelu(t, approximate="tanh"),
        "silu": functional.silu,
        "relu": functional.relu,
        "softplus": functional.softplus,
        "mish": functional.mish,
        "elu": functional.elu,
        "hard_swish": functional.hardswish,
    }.items():
        np.testing.assert_allclose(KNOWN[name](x.numpy()), function(x).numpy(), rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("name", [name for name in KNOWN if name != "identity"])
def test_gates(name: str) -> None:
    act = KNOWN[name]
    for gate, product in ((0, lambda a, b: act(a) * b), (1, lambda a, b: a * act(b))):
        found = find_gate(product)
        assert found is not None
        assert found[0] == gate
        assert name_of(found[1]) == name


def test_no_gates() -> None:
    assert find_gate(lambda a, b: KNOWN["silu"](a) + b) is None
    assert find_gate(lambda a, b: KNOWN["silu"](a) * (b + 1)) is None
    assert find_gate(lambda a, b: KNOWN["tanh"](a) * KNOWN["relu"](b)) is None
    bilinear = find_gate(lambda a, b: a * b)
    assert bilinear is not None
    assert name_of(bilinear[1]) == "identity"


@pytest.mark.parametrize(("to", "known"), [(1, True), (10, True), (16, True), (6, False), (7, False), (9, False)])
def test_casts_to_floats_alone_are_identity(to: int, known: bool) -> None:
    nodes, _, _ = parsed(f"a = Cast <to = {to}> (x) y = Cast <to = 1> (a)")
    assert [is_elementwise(node) for node in nodes] == [known, True]


def test_what_overflows_far_from_0_has_its_name() -> None:
    assert name_of(lambda x: np.log(1 + np.exp(x))) == "softplus"
    assert name_of(lambda x: x * np.exp(x) / (1 + np.exp(x))) == "silu"


def test_linear_functions() -> None:
    assert is_linear(lambda x: 3 * x - 2)
    assert not is_linear(lambda x: np.clip(x, -1e9, 1e9))
    assert not is_linear(lambda x: np.maximum(x, -7.5))


def test_a_threshold_near_0_is_no_relu() -> None:
    rng = seeded()
    for threshold in 10 ** rng.uniform(-5, 0, 20):
        nodes, _, graph = parsed(f"y = ThresholdedRelu <alpha = {threshold:.8f}> (x)")

        def function(x: np.ndarray, nodes: list[gs.Node] = nodes, graph: gs.Graph = graph) -> np.ndarray:
            return evaluate(nodes, {id(graph.inputs[0]): x}, graph.outputs[0])

        assert name_of(function) == "unknown", threshold
        assert not is_linear(function)
        gate = find_gate(lambda a, b, function=function: function(a) * b)
        assert gate is not None and name_of(gate[1]) == "unknown", threshold


def test_constants_in_half_precision_keep_names() -> None:
    rounded = {name: float(np.float16(value)) for name, value in SCALARS.items() if abs(value) < 1e3}
    root, cubic, quick = (rounded[name] for name in ("root", "cubic", "quick"))
    assert name_of(lambda x: 0.5 * x * (1 + np.tanh(root * (x + cubic * x**3)))) == "gelu_tanh"
    assert name_of(lambda x: x / (1 + np.exp(-quick * x))) == "quick_gelu"


def test_large_slopes_are_linear() -> None:
    slope, shift = 10 ** seeded().uniform(3, 9, 2)
    assert is_linear(lambda x: slope * x - shift)
    assert is_linear(lambda x: slope * x)
    assert is_linear(lambda x: 0 * x)
