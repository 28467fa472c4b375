"""Raising the opset: nodes mean the same afterwards, or the model is refused."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from seeds import seeded

from trimtab.passes.errors import ModelError
from trimtab.passes.graph.opset import raise_opset


def model(op: str, attributes: str, shape: str, opset: int = 12) -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f'<ir_version: 7, opset_import: ["": {opset}]> g (float[{shape}] x) => (float[{shape}] y) '
        f"{{ y = {op} {attributes} (x) }}"
    )


def ran(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    (y,) = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    return np.asarray(y)


def both_ran(before: onnx.ModelProto, opset: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `before` computes, and what it does once it is raised to `opset`."""
    want = ran(before, x)
    graph = gs.import_onnx(onnx.ModelProto.FromString(before.SerializeToString()))  # `before` shares its opsets
    raise_opset(graph, opset)
    return ran(gs.export_onnx(graph), x), want


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize(
    ("attributes", "shape"),
    [("", "2,5"), ("<axis = 2>", "2,3,5"), ("<axis = -1>", "2,3,5"), ("<axis = 1>", "2,5")],
)
def test_a_softmax_of_the_last_axis_stays_one(op: str, attributes: str, shape: str) -> None:
    before = model(op, attributes, shape)
    x = seeded().standard_normal([int(n) for n in shape.split(",")]).astype(np.float32)
    have, want = both_ran(before, 18, x)
    np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize("attributes", ["", "<axis = 1>", "<axis = 0>"])
def test_one_of_several_axes_together_is_refused(attributes: str) -> None:
    """Before opset 13 all axes from `axis` on, by default 1, were one."""
    graph = gs.import_onnx(model("Softmax", attributes, "2,3,5"))
    with pytest.raises(ModelError, match="several axes together"):
        raise_opset(graph, 18)
    assert graph.opset == 12 and graph.nodes[0].attrs.get("axis") != -1


def test_newer_ones_stay_as_they_are() -> None:
    graph = gs.import_onnx(model("Softmax", "<axis = 1>", "2,3,5", opset=13))
    raise_opset(graph, 18)
    assert graph.opset == 18 and graph.nodes[0].attrs == {"axis": 1}


def calling(name: str, declared: str, body: str, opset: int, call: str = "") -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["": {opset}, "own": 1]> g (float[2,3,5] x) => (float[r,s,t] y) '
        f'{{ y = own.{name} {call} (x) }} <domain: "own", opset_import: ["": {opset}]> {name} {declared} (a) => (b) '
        f"{{ {body} }}"
    )


@pytest.mark.parametrize(
    ("declared", "body", "call", "old", "new"),
    [
        ("", "m = ReduceMax <axes = [-1], keepdims = 1> (a) b = Sub (a, m)", "", 17, 21),
        ("<axes>", "m = ReduceMean <axes: ints = @axes, keepdims = 1> (a) b = Sub (a, m)", "<axes = [1]>", 13, 18),
        (
            "",
            "u = Unsqueeze <axes = [0]> (a) s = ReduceSum <axes = [2]> (u) b = Squeeze <axes = [0, 2]> (s)",
            "",
            11,
            18,
        ),
        ("", "b = Softmax <axis = -1> (a)", "", 11, 18),
    ],
)
def test_functions_follow(declared: str, body: str, call: str, old: int, new: int) -> None:
    """ONNX Runtime reads them by the model's opset, whatever they declare."""
    before = calling("F", declared, body, old, call)
    x = seeded().standard_normal((2, 3, 5)).astype(np.float32)
    have, want = both_ran(before, new, x)
    np.testing.assert_array_equal(have, want)


def test_a_function_that_would_mean_something_else_is_refused() -> None:
    graph = gs.import_onnx(calling("Chances", "", "b = Softmax <axis = 1> (a)", 11))
    with pytest.raises(ModelError, match=r"Softmax.* of the function Chances applies to several axes"):
        raise_opset(graph, 18)
    assert graph.opset == graph.functions[0].opset == 11


def test_branches_follow() -> None:
    branch = "b{0} () => (float[2] y{0}) {{ y{0} = {1} <axes = [-1], keepdims = 0> (x) }}"
    before = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 13]> g (float[2,4] x) => (float[2] y) { m = ReduceMax (x) '
        "zero = Constant <value = float {0}> () c = Greater (m, zero) "
        f"y = If (c) <then_branch = {branch.format(0, 'ReduceMean')}, else_branch = {branch.format(1, 'ReduceMin')}> }}"
    )
    x = seeded().standard_normal((2, 4)).astype(np.float32)
    for signed in (abs(x), -abs(x)):
        have, want = both_ran(before, 21, signed)
        np.testing.assert_array_equal(have, want)


def test_the_runtimes_own_ops_stay_as_they_are() -> None:
    """ONNX Runtime's optimizer writes LayerNormalization into files of older opsets than 17, the first that has it."""
    before = onnx.parser.parse_model(
        '<ir_version: 7, opset_import: ["": 14]> g (float[n,6] x) => (float[n,6] y) '
        "<float[6] scale = {1, 2, 3, 4, 5, 6}> { h = LayerNormalization <axis = -1, epsilon = 0.001> (x, scale) "
        "y = SimplifiedLayerNormalization <axis = -1> (h, scale) }"
    )
    x = seeded().standard_normal((3, 6)).astype(np.float32)
    have, want = both_ran(before, 21, x)
    np.testing.assert_array_equal(have, want)


def test_an_operator_that_is_gone_is_refused() -> None:
    graph = gs.import_onnx(
        onnx.parser.parse_model(
            '<ir_version: 7, opset_import: ["": 10]> g (float[2,5] x, int64[2,5] i) => (float[2,5] y) '
            "{ y = Scatter (x, i, x) }"
        )
    )
    with pytest.raises(ModelError, match=r"Scatter.* is no operator"):
        raise_opset(graph, 18)
