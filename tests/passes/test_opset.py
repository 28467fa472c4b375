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


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize(
    ("attributes", "shape"),
    [("", "2,5"), ("<axis = 2>", "2,3,5"), ("<axis = -1>", "2,3,5"), ("<axis = 1>", "2,5")],
)
def test_a_softmax_of_the_last_axis_stays_one(op: str, attributes: str, shape: str) -> None:
    before = model(op, attributes, shape)
    x = seeded().standard_normal([int(n) for n in shape.split(",")]).astype(np.float32)
    graph = gs.import_onnx(before)
    raise_opset(graph, 18)
    assert graph.opset == 18
    np.testing.assert_array_equal(ran(gs.export_onnx(graph), x), ran(before, x))


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
