"""Declarations: schema and shape inference, nodes in a graph, and what they refuse."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from dialects import graph_of

from trimtab.plugins import DOMAIN, OPS, SELECT_BLOCKS, SPARSE_DOWN, SPARSE_UP, add_node


@pytest.fixture
def schemas() -> object:
    """ONNX knows the ops for the time of a test."""
    for op in OPS.values():
        onnx.defs.register_schema(op.schema())
    yield
    for op in OPS.values():
        onnx.defs.deregister_schema(op.name, 1, DOMAIN)


def test_shapes_are_inferred_from_the_schema(schemas: object) -> None:
    """Without reference bodies in the model: by the declaration alone."""
    graph = graph_of(x=(np.float32, ["batch", "tokens", 64]), scores=(np.float32, ["batch", "tokens", 24]))
    x, scores = graph.inputs
    blocks = add_node(graph, SELECT_BLOCKS, {"scores": scores}, "blocks", k=6, shared=1)
    own = add_node(graph, SELECT_BLOCKS, {"scores": scores}, "own", k=6)
    up = {
        "up": gs.Constant("up", np.zeros((192, 64), np.int8)),
        "up_scale": gs.Constant("us", np.ones(192, np.float32)),
    }
    down = {
        "down": gs.Constant("down", np.zeros((192, 32), np.uint8)),
        "down_scale": gs.Constant("ds", np.ones((192, 2), np.float32)),
    }
    h = add_node(graph, SPARSE_UP, {"x": x, "blocks": blocks} | up, "h", activation="relu", block=8)
    y = add_node(graph, SPARSE_DOWN, {"h": h, "blocks": blocks} | down, "y", block=8)
    for tensor in (blocks, own, h):
        tensor.shape = None
    graph.outputs = [y]
    graph.functions = []
    model = onnx.shape_inference.infer_shapes(gs.export_onnx(graph), check_type=True, strict_mode=True)
    found = {
        v.name: [d.dim_param or d.dim_value or None for d in v.type.tensor_type.shape.dim]
        for v in model.graph.value_info
    }
    assert found == {"blocks": [1, 6], "own": ["unk__0", 6], "h": ["batch", "tokens", 48]}
    kinds = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    assert kinds["blocks"] == onnx.TensorProto.INT32 and kinds["h"] == onnx.TensorProto.FLOAT
    assert y.shape == ["batch", "tokens", 64]


@pytest.mark.parametrize("kind", [onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16])
def test_the_type_of_the_output_follows_x(schemas: object, kind: int) -> None:
    graph = graph_of(h=(kind, ["tokens", 8]), blocks=(np.int32, [1, 8]))
    h, blocks = graph.inputs
    y = add_node(
        graph, SPARSE_DOWN, {"h": h, "blocks": blocks, "down": gs.Constant("a", np.zeros((8, 4), np.int8))}, "y"
    )
    assert y.dtype == kind
    graph.functions = []
    graph.nodes.append(gs.Node("Identity", inputs=[y], outputs=[gs.Variable("z", kind)]))
    graph.outputs = graph.nodes[-1].outputs
    model = onnx.shape_inference.infer_shapes(gs.export_onnx(graph), check_type=True, strict_mode=True)
    assert {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}["y"] == kind


def test_schema_refuses_types(schemas: object) -> None:
    node = onnx.helper.make_node("SparseDown", ["h", "blocks", "down"], ["y"], domain=DOMAIN, block=1)
    values = [onnx.helper.make_tensor_value_info(n, t, ["a", "b"]) for n, t in (("h", 1), ("blocks", 7), ("down", 1))]
    graph = onnx.helper.make_graph([node], "g", values, [onnx.helper.make_tensor_value_info("y", 1, ["a", "b"])])
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(DOMAIN, 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    with pytest.raises(onnx.shape_inference.InferenceError, match="blocks"):
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


def test_every_attribute_is_on_the_node_and_every_body_once() -> None:
    graph = graph_of(scores=(np.float32, ["tokens", 24]))
    outputs = [
        add_node(graph, SELECT_BLOCKS, {"scores": graph.inputs[0]}, name, k=k) for name, k in (("a", 3), ("b", 4))
    ]
    assert all(set(node.attrs) == {a.name for a in SELECT_BLOCKS.attributes} for node in graph.nodes)
    graph.outputs = outputs
    model = gs.export_onnx(graph)
    assert [f.name for f in model.functions] == ["SelectBlocks"]
    assert {d.domain: d.version for d in model.opset_import}[DOMAIN] == 1


def test_a_graph_that_was_saved_takes_more_nodes() -> None:
    graph = graph_of(scores=(np.float32, ["tokens", 24]))
    graph.outputs = [add_node(graph, SELECT_BLOCKS, {"scores": graph.inputs[0]}, "a", k=3)]
    again = gs.import_onnx(gs.export_onnx(graph))
    again.outputs.append(add_node(again, SELECT_BLOCKS, {"scores": again.inputs[0]}, "b", k=4))
    model = gs.export_onnx(again)
    onnx.checker.check_model(model)
    assert len(model.functions) == 1


def test_refuses_what_the_op_does_not_have() -> None:
    graph = graph_of(scores=(np.float32, ["tokens", 24]))
    scores = graph.inputs[0]
    with pytest.raises(ValueError, match="has no 'score'; it has scores"):
        add_node(graph, SELECT_BLOCKS, {"score": scores}, "a")
    with pytest.raises(ValueError, match="has no 'kk'"):
        add_node(graph, SELECT_BLOCKS, {"scores": scores}, "a", kk=1)
    with pytest.raises(ValueError, match="needs 'blocks'"):
        add_node(graph, SPARSE_UP, {"x": scores}, "a")
    with pytest.raises(ValueError, match="activation is 'swish', not one of identity, relu"):
        add_node(graph, SPARSE_UP, {"x": scores, "blocks": scores, "up": scores}, "a", activation="swish")
    graph.opset = 17
    with pytest.raises(ValueError, match="needs opset 18"):
        add_node(graph, SELECT_BLOCKS, {"scores": scores}, "a")


def test_one_body_serves_one_form() -> None:
    graph = graph_of(h=(np.float32, ["tokens", 8]), blocks=(np.int32, [1, 8]))
    h, blocks = graph.inputs
    add_node(
        graph, SPARSE_DOWN, {"h": h, "blocks": blocks, "down": gs.Constant("a", np.zeros((8, 4), np.float32))}, "a"
    )
    add_node(
        graph,
        SPARSE_DOWN,
        {"h": h, "blocks": blocks, "down": gs.Constant("b", np.ones((8, 4), np.float32))},
        "b",
        block=2,
    )
    with pytest.raises(ValueError, match="already, in another form"):
        add_node(
            graph, SPARSE_DOWN, {"h": h, "blocks": blocks, "down": gs.Constant("c", np.zeros((8, 4), np.float16))}, "c"
        )
