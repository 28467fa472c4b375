"""What ONNX files have to be before anything else reads them; every model of onnx's own tests is."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from seeds import seeded

from trimtab.passes.canonicalize.runtime_schemas import register_runtime_schemas
from trimtab.passes.errors import ModelError
from trimtab.passes.graph.io import load_graph
from trimtab.passes.graph.wellformed import check, check_model
from trimtab.passes.graph.wellformed.nodes import _schema


def model() -> ModelProto:
    """x [n, 4] → MatMul → If (Relu or Neg of what is around it) → own::Twice → y; weights of every way of storage."""
    rng = seeded()
    weight = rng.normal(size=(4, 4)).astype(np.float32)
    typed = helper.make_tensor("typed", TensorProto.FLOAT, [4], weight[0].tolist())
    branches = {
        f"{which}_branch": helper.make_graph(
            [helper.make_node(op, ["h"], [f"{which}_out"])],
            which,
            [],
            [helper.make_tensor_value_info(f"{which}_out", TensorProto.FLOAT, ["n", 4])],
        )
        for which, op in (("then", "Relu"), ("else", "Neg"))
    }
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["g"], name="product"),
        helper.make_node("Add", ["g", "typed"], ["h"], name="bias"),
        helper.make_node("If", ["yes"], ["chosen"], name="choice", **branches),
        helper.make_node("Twice", ["chosen"], ["y"], name="call", domain="own"),
    ]
    twice = helper.make_function(
        "own", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 18)]
    )
    graph = helper.make_graph(
        nodes,
        "whole",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(weight, "weight"), typed, numpy_helper.from_array(np.array(True), "yes")],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=[twice], ir_version=9)


def node(given: ModelProto, name: str) -> onnx.NodeProto:
    return next(each for each in given.graph.node if each.name == name)


def call_itself(given: ModelProto) -> None:
    given.functions[0].node.append(helper.make_node("Twice", ["b"], ["c"], domain="own"))


def call_in_a_circle(given: ModelProto) -> None:
    first, second = (
        helper.make_function(
            "own", name, ["a"], ["b"], [helper.make_node(other, ["a"], ["b"], domain="own")],
            [helper.make_opsetid("own", 1)],
        )
        for name, other in (("F", "G"), ("G", "F"))
    )  # fmt: skip
    given.functions.extend([first, second])


FAULTS: dict[str, tuple[Callable[[ModelProto], object], str]] = {
    "raw values are too few": (lambda m: m.graph.initializer[0].dims.__setitem__(0, 5), "'weight' has 64 bytes.*80"),
    "typed values are too many": (lambda m: m.graph.initializer[1].float_data.append(1), "'typed' has 5 values.*4"),
    "a size is negative": (lambda m: m.graph.initializer[1].dims.__setitem__(0, -4), r"'typed' has the shape \[-4\]"),
    "a weight of an unknown type": (lambda m: setattr(m.graph.initializer[0], "data_type", 99), "unknown type 99"),
    "an input without an element type": (
        lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 0), "'x' has the element type 0"
    ),
    "an output without a type": (lambda m: m.graph.output[0].ClearField("type"), "'y' has no type"),
    "an input without a name": (lambda m: setattr(m.graph.input[0], "name", ""), "input without a name"),
    "an input of a negative size": (
        lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", -2), "'x' has a negative size"
    ),
    "a cycle": (lambda m: node(m, "product").input.__setitem__(0, "h"), "cycle in front of MatMul 'product'"),
    "a cycle through a branch": (lambda m: node(m, "bias").input.__setitem__(1, "chosen"), "cycle in front of"),
    "a name from nowhere": (lambda m: node(m, "bias").input.__setitem__(1, "none"), "nothing gives the tensor 'none'"),
    "a name from nowhere, in a branch": (
        lambda m: node(m, "choice").attribute[0].g.node[0].input.__setitem__(0, "none"), "gives the tensor 'none'"
    ),
    "an output from nowhere": (lambda m: setattr(m.graph.output[0], "name", "z"), "nothing gives the output 'z'"),
    "a name given twice": (lambda m: node(m, "bias").output.__setitem__(0, "g"), "'g' is given twice.*Add 'bias'"),
    "two weights of a name": (
        lambda m: m.graph.initializer.append(m.graph.initializer[0]), "initializer 'weight' is given twice"
    ),
    "an attribute is missing": (
        lambda m: m.graph.node.append(helper.make_node("Cast", ["y"], ["z"])), "Cast 'z' has no attribute 'to'"
    ),
    "an attribute is missing in a function": (
        lambda m: m.functions[0].node.append(helper.make_node("Cast", ["b"], ["z"])), "Cast 'z' has no attribute 'to'"
    ),
    "an attribute of the wrong type": (
        lambda m: m.graph.node.append(helper.make_node("Cast", ["y"], ["z"], to="float")), "'to' of Cast.*wrong type"
    ),
    "an attribute without a value": (
        lambda m: node(m, "bias").attribute.add(name="a", type=onnx.AttributeProto.TENSOR), "'a' of Add 'bias' has no v"
    ),
    "an attribute given twice": (
        lambda m: node(m, "choice").attribute.append(node(m, "choice").attribute[0]), "given twice"
    ),
    "an attribute of a function outside": (
        lambda m: node(m, "bias").attribute.add(name="a", type=onnx.AttributeProto.INT, ref_attr_name="a"), "refers to"
    ),
    "inputs are missing": (lambda m: node(m, "bias").input.pop(), "has 1 inputs, but Add takes 2"),
    "an input is left out": (lambda m: node(m, "bias").input.__setitem__(0, ""), "Add 'bias' has no input 'A'"),
    "outputs are too many": (lambda m: node(m, "bias").output.append("more"), "has 2 outputs, but Add takes 1"),
    "no op": (lambda m: setattr(node(m, "bias"), "op_type", ""), "has no op"),
    "a function that calls itself": (call_itself, "'own::Twice' calls itself"),
    "functions that call each other": (call_in_a_circle, "calls itself"),
    "a function defined twice": (lambda m: m.functions.append(m.functions[0]), "'own::Twice' is defined twice"),
    "no opset": (lambda m: m.opset_import.pop(0), "imports no opset of ONNX's own ops"),
    "an opset given twice": (lambda m: m.opset_import.append(helper.make_opsetid("", 17)), "given twice"),
    "an opset of the future": (lambda m: setattr(m.opset_import[0], "version", 9999), "9999 is newer"),
    "an opset of 0": (lambda m: setattr(m.opset_import[1], "version", 0), "'own' is 0"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str, tmp_path: Path) -> None:
    change, reason = FAULTS[fault]
    given = model()
    onnx.save(given, tmp_path / "sound.onnx")
    load_graph(tmp_path / "sound.onnx")
    change(given)
    (tmp_path / "damaged.onnx").write_bytes(given.SerializeToString())
    with pytest.raises(ModelError, match=f"damaged.onnx: not a well-formed ONNX graph: .*{reason}"):
        load_graph(tmp_path / "damaged.onnx")


def test_every_model_of_onnx_is_well_formed() -> None:
    """Those of the backend tests have every op of every type, and graphs in attributes."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = {case.name: case.model for case in collect_testcases(None)}
    assert len(cases) > 1000
    for name, each in cases.items():
        check_model(each, name)
    stored = sorted((Path(onnx.__file__).parent / "backend" / "test" / "data").rglob("*.onnx"))
    assert len(stored) > 50
    for path in stored:
        check_model(onnx.load(path, load_external_data=False), str(path))


@pytest.mark.parametrize("kind", sorted(set(TensorProto.DataType.values()) - {TensorProto.UNDEFINED}))
def test_values_of_every_type_are_counted(kind: int) -> None:
    """In typed fields and raw; one value more or less is refused."""
    rng = seeded()
    shape = [int(rng.integers(1, 5)), 8]  # whole bytes of the types that share them
    if kind == TensorProto.STRING:
        array = np.full(shape, "text", object)
    else:
        array = np.ones(shape).astype(helper.tensor_dtype_to_np_dtype(kind))
    raw = numpy_helper.from_array(array, "as bytes")
    typed = helper.make_tensor("as numbers", kind, shape, array.reshape(-1).tolist())
    for tensor in (raw, typed):
        given = model()
        given.graph.initializer.append(tensor)
        check_model(given, "sound")
        for change in (4, -1):
            if shape[0] + change >= 0:
                given.graph.initializer[-1].dims[0] = shape[0] + change
                with pytest.raises(ModelError, match=re.escape(f"tensor {tensor.name!r} has")):
                    check_model(given, "damaged")


def nested(depth: int) -> onnx.GraphProto:
    """A graph of graphs, `depth` in all."""
    inner = helper.make_node("Identity", ["yes"], [f"out{depth}"])
    if depth > 1:
        graph = nested(depth - 1)
        inner = helper.make_node("If", ["yes"], [f"out{depth}"], then_branch=graph, else_branch=graph)
    return helper.make_graph([inner], "g", [], [helper.make_tensor_value_info(f"out{depth}", TensorProto.BOOL, [])])


def test_nesting_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MAX_NESTING", 4)
    for depth, right in ((4, True), (5, False)):
        graph = nested(depth)
        graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
        given = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
        if right:
            check_model(given, "model")
        else:
            with pytest.raises(ModelError, match="nested more than 4 deep"):
                check_model(given, "model")


def test_functions_count_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three functions that each call the one before twice have 2, 4 and 8 nodes."""
    given = model()
    for i, callee in enumerate(("Twice", "F0", "F1")):
        calls = [helper.make_node(callee, ["a"], [f"b{j}"], domain="own") for j in range(2)]
        opsets = [helper.make_opsetid("own", 1)]
        given.functions.append(helper.make_function("own", f"F{i}", ["a"], ["b0"], calls, opsets))
    given.graph.node.append(helper.make_node("F2", ["y"], ["z"], domain="own"))
    own = 2 + 1 + 2 + 1  # product and bias, If with its branches, Twice
    for limit, right in ((own + 8, True), (own + 7, False), (7, False)):
        monkeypatch.setattr(check, "MAX_NODES", limit)
        if right:
            check_model(given, "model")
        else:
            with pytest.raises(ModelError, match=f"more than {limit} nodes"):
                check_model(given, "model")


def test_unknown_ops_are_taken_as_they_are() -> None:
    """ONNX Runtime's own ops, and its use of LayerNormalization in front of the opset that has it."""
    given = model()
    given.opset_import[0].version = 14
    given.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    given.graph.node.extend([
        helper.make_node("LayerNormalization", ["y", "typed"], ["z0"]),
        helper.make_node("Gelu", ["z0"], ["z1"], domain="com.microsoft", anything=3),
    ])  # fmt: skip
    check_model(given, "model")


def test_what_writers_leave_out_is_no_fault(tmp_path: Path) -> None:
    """Numbers of 0 and empty strings are not written by some; -1 is any size; "ai.onnx" is ONNX's own domain."""
    given = model()
    given.opset_import[0].domain = "ai.onnx"
    given.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    soft = helper.make_node("Softmax", ["y"], ["z"], domain="ai.onnx")
    soft.attribute.add(name="axis", type=onnx.AttributeProto.INT)
    given.graph.node.append(soft)
    onnx.save(given, tmp_path / "m.onnx")
    graph = load_graph(tmp_path / "m.onnx")
    assert graph.nodes[-1].attrs["axis"] == 0
    assert all(each.domain in ("", None, "own") for each in graph.nodes)
    assert graph.opset == 18


def test_checks_do_not_depend_on_what_was_registered() -> None:
    """Shape inference tells onnx of ONNX Runtime's ops; they are taken as they are before and after."""
    given = model()
    given.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    given.graph.node.append(helper.make_node("BiasGelu", ["y"], ["z"], domain="com.microsoft"))  # it takes two inputs
    check_model(given, "model")
    register_runtime_schemas([("com.microsoft", "BiasGelu", 1)])
    onnx.defs.get_schema("BiasGelu", 1, "com.microsoft")
    _schema.cache_clear()
    check_model(given, "model")


@pytest.mark.parametrize("name", ["product", "weight", "Twice", "then_out", "whole", "else"])
def test_names_are_text(name: str, tmp_path: Path) -> None:
    """Of nodes, weights, functions, and of what is in branches."""
    stored = model().SerializeToString()
    assert name.encode() in stored
    damaged = stored.replace(name.encode(), b"\xa0" + name.encode()[1:])
    (tmp_path / "m.onnx").write_bytes(damaged)
    with pytest.raises(ModelError, match=r"not a well-formed ONNX graph: the text .* is not UTF-8"):
        load_graph(tmp_path / "m.onnx")
