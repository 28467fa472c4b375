"""Declarations: schema and shape inference, nodes in a graph, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from counting import COUNTING
from dialects import finish, graph_of
from onnx.reference import ReferenceEvaluator

from trimtab.passes.canonicalize.shapes import infer_shapes
from trimtab.plugins import (
    FOLDERS,
    KEEP_TOKENS,
    OPS,
    PACKED_ATTENTION,
    SELECT_BLOCKS,
    SPARSE_DOWN,
    SPARSE_UP,
    add_multi_output_node,
    add_node,
    register_schemas,
)
from trimtab.plugins.dialect import DOMAIN


@pytest.fixture
def schemas() -> None:
    """ONNX knows the ops."""
    register_schemas()


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


def test_constants_of_bodies_are_tensors() -> None:
    """ONNX Runtime 1.22 fails on others where shapes are known, and graphsurgeon folds some to float64."""
    graph = graph_of(importance=(np.float32, [5]), offsets=(np.int32, [3]), threshold=(np.float32, [1]))
    given = dict(zip(("importance", "offsets", "threshold"), graph.inputs, strict=True))
    add_multi_output_node(graph, KEEP_TOKENS, given, "keep")
    (body,) = gs.export_onnx(graph).functions
    attributes = [a for node in body.node if node.op_type == "Constant" for a in node.attribute]
    assert attributes and {a.name for a in attributes if not a.ref_attr_name} == {"value"}


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


@pytest.mark.parametrize("named", [("values", "total", "places"), ("values", "places"), ("values",), None])
def test_several_outputs(named: tuple[str, ...] | None) -> None:
    """Those that a node names, of which two share a size that hangs on data, in every runtime of reference bodies."""
    op, x = COUNTING, np.array([0, 3, 0, -2, 5], np.float32)
    graph = graph_of(x=(np.float32, ["n"]))
    outputs = add_multi_output_node(graph, op, {"x": graph.inputs[0]}, "count/layer.1", named)
    wanted = {"values": x[x != 0], "total": x.sum(), "places": np.flatnonzero(x)}
    names = named or tuple(wanted)
    assert [t.name for t in outputs] == [f"count/layer.1/{name}" for name in names]
    assert all(t.shape == ([] if "total" in t.name else ["count/layer.1.found"]) for t in outputs)
    model = finish(graph, *outputs)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for got in (session.run(None, {"x": x}), ReferenceEvaluator(model).run(None, {"x": x})):
        for array, name in zip(got, names, strict=True):
            np.testing.assert_array_equal(array, wanted[name])
            assert array.dtype == (np.int32 if name == "places" else np.float32)


def test_one_body_serves_nodes_that_name_other_outputs() -> None:
    """Two layers of a model need not ask for the same outputs."""
    op, x = COUNTING, np.array([1, 0, 2], np.float32)
    graph = graph_of(x=(np.float32, ["n"]))
    one = add_node(graph, op, {"x": graph.inputs[0]}, "one")
    _, places = add_multi_output_node(graph, op, {"x": one}, "other", ("values", "places"))
    model = finish(graph, one, places)
    assert one.name == "one" and one.shape == ["one.found"] and len(model.functions) == 1
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    values, found = session.run(None, {"x": x})
    np.testing.assert_array_equal(values, [1, 2])
    np.testing.assert_array_equal(found, [0, 1])


def test_shapes_of_several_outputs_are_inferred() -> None:
    op = COUNTING
    graph = graph_of(x=(np.float16, ["n"]))
    outputs = add_multi_output_node(graph, op, {"x": graph.inputs[0]}, "node")
    for tensor in outputs:
        tensor.shape = None
        graph.nodes.append(
            gs.Node("Identity", inputs=[tensor], outputs=[gs.Variable(f"{tensor.name}/end", tensor.dtype)])
        )
    graph.outputs, graph.functions = [node.outputs[0] for node in graph.nodes[1:]], []
    onnx.defs.register_schema(op.schema())
    try:
        model = onnx.shape_inference.infer_shapes(gs.export_onnx(graph), check_type=True, strict_mode=True)
    finally:
        onnx.defs.deregister_schema(op.name, 1, DOMAIN)
    found = {v.name: (v.type.tensor_type.elem_type, len(v.type.tensor_type.shape.dim)) for v in model.graph.value_info}
    half, whole = onnx.TensorProto.FLOAT16, onnx.TensorProto.INT32
    assert found == {"node/values": (half, 1), "node/total": (half, 0), "node/places": (whole, 1)}


def test_shapes_behind_sizes_that_hang_on_data_are_known() -> None:
    """By the ops' rules: bodies do not tell them."""
    graph = graph_of(x=(np.float32, ["t", 16]), offsets=(np.int32, ["b"]), threshold=(np.float32, [1]))
    x, offsets, threshold = graph.inputs
    given = {"q": x, "k": x, "v": x, "offsets": offsets}
    context, received = add_multi_output_node(graph, PACKED_ATTENTION, given, "attention", heads=2)
    tokens = {"importance": received, "offsets": offsets, "threshold": threshold}
    kept, ends = add_multi_output_node(graph, KEEP_TOKENS, tokens, "keep")
    rows, y = gs.Variable("rows", np.float32), gs.Variable("y", np.float32)
    graph.nodes.append(gs.Node("Gather", inputs=[context, kept], outputs=[rows]))
    graph.nodes.append(gs.Node("Relu", inputs=[rows], outputs=[y]))
    graph.outputs = [y, ends]
    infer_shapes(graph)
    assert context.shape == ["t", 16] and received.shape == ["t"]
    assert len(rows.shape) == 2 and rows.shape[1] == 16 and isinstance(kept.shape[0], str)
    x.shape = []  # of no rank that an op takes
    infer_shapes(graph)
    assert context.shape is None and context.dtype == np.float32


def test_refuses_outputs_that_the_op_does_not_have() -> None:
    op = COUNTING
    two = replace(op, outputs=tuple(replace(o, optional=False) for o in op.outputs))
    graph = graph_of(x=(np.float32, ["n"]))
    given = {"x": graph.inputs[0]}
    with pytest.raises(ValueError, match="no output 'value'; it has values, total, places"):
        add_multi_output_node(graph, op, given, "a", ("values", "value"))
    with pytest.raises(ValueError, match="its output 'values' has to be named"):
        add_multi_output_node(graph, op, given, "a", ("total",))
    with pytest.raises(ValueError, match="Counting has several outputs"):
        add_node(graph, two, given, "a")
    assert not graph.nodes


@pytest.mark.parametrize("change", [{"name": "x"}, {"optional": True}, {"type": "scores"}])
def test_refuses_declarations_that_contradict_themselves(change: dict[str, Any]) -> None:
    op = COUNTING
    with pytest.raises(ValueError, match="Counting"):
        replace(op, outputs=(replace(op.outputs[0], **change),))


def test_every_folder_declares_its_op() -> None:
    """By the name of its constant, from the folder as from the dialect."""
    import trimtab.plugins

    for name, folder in FOLDERS.items():
        op = getattr(import_module(f"trimtab.plugins.{folder}"), folder.upper())
        assert op is OPS[name] is getattr(trimtab.plugins, folder.upper()) and op.name == name
    with pytest.raises(AttributeError, match="SPARSE_SIDEWAYS"):
        trimtab.plugins.SPARSE_SIDEWAYS  # noqa: B018
