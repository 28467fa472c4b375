"""What graphsurgeon's graph has no place for: kept all the same, or refused by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from seeds import seeded

from trimtab.passes.canonicalize import Canonicalize
from trimtab.passes.contract import PassContext
from trimtab.passes.errors import ModelError
from trimtab.passes.graph import densify, load_graph, save_graph
from trimtab.passes.graph.importable import make_importable
from trimtab.passes.precision import Precision


def parsed(body: str, functions: str = "", *, size: int = 5, inputs: str = "", opset: int = 20) -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {opset}, "own": 1]> '
        f"agraph (float[n, {size}] x{inputs}) => (float[n, {size}] y) {{ {body} }} {functions}"
    )


def ran(path: Path, x: np.ndarray) -> np.ndarray:
    (y,) = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    return np.asarray(y)


def rewritten(model: onnx.ModelProto, folder: Path, *passes: Canonicalize | Precision) -> tuple[Path, Path]:
    """`model`, and what it is after a round trip with `passes` between."""
    before, after = folder / "before.onnx", folder / "after.onnx"
    onnx.save(model, before)
    graph = load_graph(before)
    for each in passes:
        each.run(graph, PassContext())
    save_graph(graph, after)
    return before, after


def overloaded(name: str, nodes: dict[str, str], opset: int = 20) -> list[onnx.FunctionProto]:
    """One function of `name` for each overload, of one op."""
    opsets = [helper.make_opsetid("", opset)]
    return [
        helper.make_function("own", name, ["a"], ["b"], [helper.make_node(op, ["a"], ["b"])], opsets, overload=overload)
        for overload, op in nodes.items()
    ]


def test_functions_of_one_name_stay_apart_by_their_overloads(tmp_path: Path) -> None:
    """Called by another function, and beside one that has the name already. ONNX Runtime 1.31 mixes up such calls."""
    model = parsed("s = Neg (x) y = Outer (s)")
    model.graph.node[1].domain = "own"
    calls = [
        helper.make_node("F", ["a"], ["c"], domain="own", overload="exp"),
        helper.make_node("F", ["c"], ["d"], domain="own", overload=""),
        helper.make_node("F_exp", ["d"], ["b"], domain="own"),
    ]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    model.functions.extend(overloaded("F", {"": "Tanh", "exp": "Exp"}))
    model.functions.extend(overloaded("F_exp", {"": "Abs"}))
    model.functions.append(helper.make_function("own", "Outer", ["a"], ["b"], calls, opsets))
    _, after = rewritten(model, tmp_path, Canonicalize())
    x = seeded().standard_normal((3, 5)).astype(np.float32)
    np.testing.assert_allclose(ran(after, x), np.abs(np.tanh(np.exp(-x))), rtol=1e-5)


def test_overloads_are_told_apart_in_branches(tmp_path: Path) -> None:
    branches = {
        key: onnx.parser.parse_graph(f"branch () => (float[n, 5] {key}) {{ {key} = own.F (x) }}")
        for key in ("loud", "soft")
    }
    for overload, branch in branches.items():
        branch.node[0].overload = overload
    model = parsed("y = Neg (x)", inputs=", bool chosen")
    model.graph.node[0].CopyFrom(
        helper.make_node("If", ["chosen"], ["y"], then_branch=branches["loud"], else_branch=branches["soft"])
    )
    model.functions.extend(overloaded("F", {"loud": "Exp", "soft": "Sigmoid"}))
    _, after = rewritten(model, tmp_path)
    x = seeded().standard_normal((2, 5)).astype(np.float32)
    session = ort.InferenceSession(str(after), providers=["CPUExecutionProvider"])
    for chosen, want in ((True, np.exp(x)), (False, 1 / (1 + np.exp(-x)))):
        np.testing.assert_allclose(session.run(None, {"x": x, "chosen": np.array(chosen)})[0], want, rtol=1e-5)


@pytest.mark.parametrize("passes", [(), (Canonicalize(),), (Canonicalize(), Precision())])
def test_a_sequence_between_nodes_stays_one(tmp_path: Path, passes: tuple[Canonicalize | Precision, ...]) -> None:
    """Also in half precision, which it keeps out of: a Cast takes no sequence."""
    rng = seeded()
    model = parsed(
        "h = MatMul (x, w) parts = SplitToSequence <axis = 1, keepdims = 1> (h) "
        "joined = ConcatFromSequence <axis = 1> (parts) y = MatMul (joined, w)"
    )
    model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal((5, 5)).astype(np.float32) / 3, "w"))
    model = onnx.shape_inference.infer_shapes(model)  # as files that name the types between their nodes
    before, after = rewritten(model, tmp_path, *passes)
    x = rng.standard_normal((4, 5)).astype(np.float32)
    np.testing.assert_allclose(ran(after, x), ran(before, x), atol=3e-2 if len(passes) > 1 else 0)


def test_what_a_model_says_of_itself_is_kept(tmp_path: Path) -> None:
    model = parsed("y = Neg (x)")
    helper.set_model_props(model, {"labels": '{"0": "größer"}', "empty": ""})
    model.model_version, model.domain, model.doc_string = 11, "org.example", "of two lines\nand more"
    before, after = rewritten(model, tmp_path, Canonicalize())
    for path in (before, after):
        info = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_modelmeta()
        assert info.custom_metadata_map == {"labels": '{"0": "größer"}', "empty": ""}
        assert (info.version, info.domain, info.description) == (11, "org.example", "of two lines\nand more")


def with_sparse_weight() -> onnx.ModelProto:
    model = parsed("y = Add (x, thin)")
    values = numpy_helper.from_array(np.array([2, 3], np.float32), "thin")
    places = numpy_helper.from_array(np.array([1, 4], np.int64), "places")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [5]))
    return model


def sparse(values: np.ndarray, places: np.ndarray, dims: Sequence[int]) -> onnx.ModelProto:
    model = parsed("y = Neg (x)")
    tensors = numpy_helper.from_array(values, "thin"), numpy_helper.from_array(places, "places")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(*tensors, list(dims)))
    return model


@pytest.mark.parametrize("form", ["flat", "along each axis"])
@pytest.mark.parametrize("dims", [(7,), (3, 5), (2, 3, 4)])
def test_sparse_weights_are_read_as_dense_ones(tmp_path: Path, dims: tuple[int, ...], form: str) -> None:
    rng = seeded()
    size = int(np.prod(dims))
    places = np.sort(rng.choice(size, size // 2, replace=False)).astype(np.int64)
    wanted = np.zeros(size, np.float32)
    wanted[places] = rng.normal(0, 1, len(places))
    at = places if form == "flat" else np.stack(np.unravel_index(places, dims), 1)
    onnx.save(sparse(wanted[places], at, dims), tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    make_importable(proto, "model.onnx")
    (weight,) = (each for each in proto.graph.initializer if each.name == "thin")
    np.testing.assert_array_equal(numpy_helper.to_array(weight), wanted.reshape(dims))
    assert not proto.graph.sparse_initializer


def test_a_graph_with_a_sparse_weight_computes_what_it_did(tmp_path: Path) -> None:
    onnx.save(with_sparse_weight(), tmp_path / "before.onnx")
    save_graph(load_graph(tmp_path / "before.onnx"), tmp_path / "after.onnx")
    x = seeded().normal(0, 1, (3, 5)).astype(np.float32)
    before, after = (
        ort.InferenceSession(str(tmp_path / name), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for name in ("before.onnx", "after.onnx")
    )
    np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(after, x + np.array([0, 2, 0, 0, 3], np.float32))


ONES, PLACES = np.ones(2, np.float32), np.array([1, 4], np.int64)


@pytest.mark.parametrize(
    ("values", "places", "dims", "says"),
    [
        (ONES, PLACES, (4,), "a value outside its dimensions"), (ONES, -PLACES, (9,), "a value outside its dimensions"),
        (ONES, np.array([[0, 1], [3, 0]]), (3, 2), "a value outside its dimensions"),
        (ONES, PLACES[:1], (9,), r"\[2\] values of \[9\] at int64 \[1\] places"),
        (ONES, PLACES.astype(np.int32), (9,), "at int32"), (ONES, PLACES, (9, -1), "places"),
        (ONES, PLACES, (1 << 29,), f"of at most {densify.MAX_BYTES} bytes"),
        (ONES, PLACES, (1 << 40, 1 << 40), f"of at most {densify.MAX_BYTES} bytes"),
    ],
)  # fmt: skip
def test_damaged_sparse_weights_are_named(
    values: np.ndarray, places: np.ndarray, dims: tuple[int, ...], says: str
) -> None:
    with pytest.raises(ModelError, match=rf"m\.onnx: the sparse initializer 'thin' .*{says}"):
        make_importable(sparse(values, places, dims), "m.onnx")


def with_sparse_constant() -> onnx.ModelProto:
    model = parsed("y = Neg (x)")
    (weight,) = with_sparse_weight().graph.sparse_initializer
    model.graph.node.insert(0, helper.make_node("Constant", [], ["thin"], name="thinned", sparse_value=weight))
    model.graph.node[1].CopyFrom(helper.make_node("Add", ["x", "thin"], ["y"]))
    return model


def with_optional_input() -> onnx.ModelProto:
    model = parsed("y = Neg (x)")
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, ["n"])
    model.graph.input.append(helper.make_value_info("perhaps", helper.make_optional_type_proto(tensor)))
    return model


def with_sequence_output() -> onnx.ModelProto:
    model = parsed("y = Neg (x) parts = SplitToSequence <axis = 1> (x)")
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    model.graph.output.append(helper.make_value_info("parts", helper.make_sequence_type_proto(tensor)))
    return model


def with_typed_optional() -> onnx.ModelProto:
    model = parsed("y = Neg (x)")
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    model.graph.node.append(helper.make_node("Optional", [], ["nothing"], name="empty one", type=tensor))
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (with_sparse_constant, "'sparse_value' of node thinned.*SPARSE_TENSOR"),
        (with_optional_input, "input 'perhaps' is of optional type"),
        (with_sequence_output, "output 'parts' is of sequence type"),
        (with_typed_optional, "'type' of node empty one.*TYPE_PROTO"),
    ],
)
def test_what_has_no_form_is_refused_by_name(tmp_path: Path, make: Callable[[], onnx.ModelProto], words: str) -> None:
    onnx.save(make(), tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=f"model.onnx: .*{words}") as refusal:
        load_graph(tmp_path / "model.onnx")
    assert refusal.value.hint


def test_an_overload_that_no_function_has_is_refused(tmp_path: Path) -> None:
    """ONNX Runtime and others would call the plain function."""
    model = parsed("y = own.F (x)")
    model.functions.extend(overloaded("F", {"": "Relu", "other": "Neg"}))
    model.graph.node[0].overload = "missing"
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="calls the overload 'missing' of F"):
        load_graph(tmp_path / "m.onnx")
