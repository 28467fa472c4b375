"""Graphs come back from disk as they went, their weights stay on disk, and damaged files are refused."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from seeds import seeded

from trimtab.passes.errors import ModelError
from trimtab.passes.graph import constant, insert, is_external, load_graph, rename_output, save_graph, values
from trimtab.passes.graph.io import model_fingerprint

WIDTH = 96


def chain(weights: int = 3, seed: int = 0, dtype: type = np.float32) -> gs.Graph:
    """x → x W0 W1 ... with a small scale at the end, which stays in the file itself."""
    rng = np.random.default_rng(seed)
    x = gs.Variable("x", dtype, ["n", WIDTH])
    y, nodes = x, []
    for i in range(weights):
        weight = constant(f"w{i}", rng.normal(0, 0.1, (WIDTH, WIDTH)).astype(dtype))
        out = gs.Variable(f"y{i}")
        nodes.append(gs.Node("MatMul", name=f"product {i}", inputs=[y, weight], outputs=[out]))
        y = out
    scaled = gs.Variable("scaled", dtype, ["n", WIDTH])
    nodes.append(gs.Node("Mul", inputs=[y, constant("scale", np.array(1.5, dtype))], outputs=[scaled]))
    return gs.Graph(nodes, [x], [scaled], opset=20)


def run(path: Path, x: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def weights(graph: gs.Graph) -> dict[str, gs.Constant]:
    return {name: t for name, t in graph.tensors().items() if isinstance(t, gs.Constant)}


@pytest.mark.parametrize("external", [True, False])
def test_round_trip(tmp_path: Path, external: bool) -> None:
    graph = chain()
    expected = {name: values(tensor) for name, tensor in weights(graph).items()}
    save_graph(graph, tmp_path / "a.onnx", external=external)
    assert (tmp_path / "a.onnx.data").exists() == external
    loaded = load_graph(tmp_path / "a.onnx")
    save_graph(loaded, tmp_path / "b.onnx", external=external)
    for path in (tmp_path / "a.onnx", tmp_path / "b.onnx"):
        found = weights(load_graph(path))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(values(found[name]), value)
            assert is_external(found[name]) == (external and name != "scale")
        onnx.checker.check_model(str(path), full_check=True)
    x = np.random.default_rng(1).normal(size=(5, WIDTH)).astype(np.float32)
    dense = x.astype(np.float64)
    for i in range(3):
        dense = dense @ expected[f"w{i}"]
    np.testing.assert_allclose(run(tmp_path / "b.onnx", x), dense * 1.5, rtol=1e-4, atol=1e-5)


def test_saving_leaves_the_graph_as_it_was(tmp_path: Path) -> None:
    save_graph(chain(), tmp_path / "a.onnx")
    graph = load_graph(tmp_path / "a.onnx")
    graph.outputs[0].inputs[0].inputs[1].values = np.array(2.0, np.float32)  # a pass changed a weight
    held = {name: tensor._values for name, tensor in weights(graph).items()}
    save_graph(graph, tmp_path / "b.onnx")
    save_graph(graph, tmp_path / "c.onnx")
    assert all(tensor._values is held[name] for name, tensor in weights(graph).items())
    assert (tmp_path / "b.onnx.data").read_bytes() == (tmp_path / "c.onnx.data").read_bytes()


def test_new_values_replace_external_ones_whatever_their_size(tmp_path: Path) -> None:
    save_graph(chain(), tmp_path / "a.onnx")
    graph = load_graph(tmp_path / "a.onnx")
    large, small = np.full((WIDTH, WIDTH), 2, np.float32), np.full((WIDTH, 1), 3, np.float32)
    found = weights(graph)
    found["w0"].values, found["w2"].values = large, small
    save_graph(graph, tmp_path / "b.onnx")
    again = weights(load_graph(tmp_path / "b.onnx"))
    np.testing.assert_array_equal(values(again["w0"]), large)
    np.testing.assert_array_equal(values(again["w2"]), small)
    assert not is_external(again["w2"])


def test_weights_are_neither_loaded_nor_held(tmp_path: Path) -> None:
    width, count = 1024, 8  # 32 MB in all
    rng = np.random.default_rng(0)
    x = gs.Variable("x", np.float32, ["n", width])
    y, nodes = x, []
    for i in range(count):
        out = gs.Variable(f"y{i}", np.float32)
        weight = constant(f"w{i}", rng.random((width, width), np.float32))
        nodes.append(gs.Node("MatMul", inputs=[y, weight], outputs=[out]))
        y = out
    save_graph(gs.Graph(nodes, [x], [y], opset=20), tmp_path / "a.onnx")
    del nodes, weight
    tracemalloc.start()
    try:
        graph = load_graph(tmp_path / "a.onnx")
        model_fingerprint(graph)
        values(weights(graph)["w3"])
        save_graph(graph, tmp_path / "b.onnx")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 << 20  # one chunk of the copy, not the weights
    assert all(is_external(tensor) for tensor in weights(graph).values())
    assert (tmp_path / "b.onnx").stat().st_size < 10_000
    assert (tmp_path / "a.onnx.data").read_bytes() == (tmp_path / "b.onnx.data").read_bytes()


def test_types_that_numpy_lacks_survive(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    packed = TensorProto(name="q", data_type=TensorProto.INT4, dims=[64, 129], raw_data=rng.bytes(64 * 129 // 2))
    half = rng.normal(size=(64, 32)).astype(np.float16)
    kinds = {"q": packed, "half": half, "flags": rng.random((40, 50)) < 0.5}
    nodes = [gs.Node("Identity", inputs=[constant(n, v)], outputs=[gs.Variable(n + "/out")]) for n, v in kinds.items()]
    y = gs.Variable("y", np.float16)
    nodes[1].outputs = [y]
    graph = gs.Graph(nodes, [], [y], opset=21)
    expected = {name: values(tensor).copy() for name, tensor in weights(graph).items()}
    save_graph(graph, tmp_path / "a.onnx")
    save_graph(load_graph(tmp_path / "a.onnx"), tmp_path / "b.onnx")
    found = weights(load_graph(tmp_path / "b.onnx"))
    for name, value in expected.items():
        assert is_external(found[name]) and values(found[name]).dtype == value.dtype
        np.testing.assert_array_equal(values(found[name]), value)


def test_weights_of_subgraphs_move_along(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) for name in ("then", "else", "outer")}

    def branch(name: str) -> onnx.GraphProto:
        nodes = [
            helper.make_node("MatMul", ["x", f"{name}/w"], [f"{name}/y"]),
            helper.make_node("MatMul", [f"{name}/y", "outer/w"], [f"{name}/z"]),
        ]
        out = helper.make_tensor_value_info(f"{name}/z", TensorProto.FLOAT, ["n", WIDTH])
        return helper.make_graph(nodes, name, [], [out], [numpy_helper.from_array(arrays[name], f"{name}/w")])

    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "outer/w"], ["unused"]),
            helper.make_node("If", ["flag"], ["y"], then_branch=branch("then"), else_branch=branch("else")),
        ],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", WIDTH])],
        [numpy_helper.from_array(arrays["outer"], "outer/w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    (tmp_path / "a").mkdir()
    onnx.save(model, tmp_path / "a" / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=100)
    save_graph(load_graph(tmp_path / "a" / "m.onnx"), tmp_path / "b.onnx")
    (tmp_path / "a" / "w.bin").unlink(missing_ok=True)
    session = ort.InferenceSession(str(tmp_path / "b.onnx"), providers=["CPUExecutionProvider"])
    x = rng.normal(size=(3, WIDTH)).astype(np.float32)
    for name, flag in (("then", True), ("else", False)):
        (y,) = session.run(None, {"x": x, "flag": np.array(flag)})
        np.testing.assert_allclose(y, x.astype(np.float64) @ arrays[name] @ arrays["outer"], rtol=1e-3, atol=1e-3)


def test_a_graph_does_not_overwrite_the_weights_it_reads(tmp_path: Path) -> None:
    save_graph(chain(), tmp_path / "a.onnx")
    before = (tmp_path / "a.onnx.data").read_bytes()
    with pytest.raises(ModelError, match=r"a\.onnx\.data"):
        save_graph(load_graph(tmp_path / "a.onnx"), tmp_path / "a.onnx")
    assert (tmp_path / "a.onnx.data").read_bytes() == before


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    save_graph(chain(1), tmp_path / "a.onnx", external=False)
    whole = (tmp_path / "a.onnx").read_bytes()
    path = tmp_path / "cut.onnx"
    for length in [*range(200), *range(200, len(whole), 997), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            load_graph(path)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"PK\x03\x04" + bytes(100), b'{"graph": {}}', bytes(range(256)) * 9]
)
@pytest.mark.parametrize("name", ["m.onnx", "m.json", "m.onnxtxt"])
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=name) as error:
        load_graph(tmp_path / name)
    assert error.value.hint


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        load_graph(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="is a directory, not a file"):
        load_graph(tmp_path)
    save_graph(chain(), tmp_path / "a.onnx")
    (tmp_path / "a.onnx.data").unlink()
    with pytest.raises(ModelError, match=r"a\.onnx\.data' is missing"):
        load_graph(tmp_path / "a.onnx")


def test_a_tensor_from_nowhere_is_refused(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["ghost"], ["y"])], "g", [], [helper.make_tensor_value_info("y", 1, [1])]
    )
    onnx.save(helper.make_model(graph), tmp_path / "a.onnx")
    with pytest.raises(ModelError, match="ghost"):
        load_graph(tmp_path / "a.onnx")


def test_short_external_data_is_refused(tmp_path: Path) -> None:
    save_graph(chain(), tmp_path / "a.onnx")
    data = tmp_path / "a.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"'w2'.*needs"):
        load_graph(tmp_path / "a.onnx")


def refer(path: Path, **entries: object) -> Path:
    """A model whose only weight has the given external data entries."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[64], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        weight.external_data.add(key=key, value=str(value))
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [64])
    graph = helper.make_graph([helper.make_node("Relu", ["w"], ["y"])], "g", [], [out], [weight])
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


def test_external_data_must_lie_below_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    outside = tmp_path / "secret.bin"
    outside.write_bytes(bytes(256))
    os.symlink(outside, folder / "link.bin")
    (folder / "inside.bin").write_bytes(bytes(256))
    for location in ("../secret.bin", str(outside), "link.bin", "", "x/../../secret.bin", "in\0side.bin"):
        with pytest.raises(ModelError, match="outside"):
            load_graph(refer(folder / "m.onnx", location=location))
    assert is_external(weights(load_graph(refer(folder / "m.onnx", location="inside.bin")))["w"])


@pytest.mark.parametrize("entries", [{"offset": -8}, {"offset": "many"}, {"offset": 4}, {"length": 8}, {"length": "x"}])
def test_impossible_places_are_refused(tmp_path: Path, entries: dict[str, object]) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(256))
    with pytest.raises(ModelError, match="'w'"):
        load_graph(refer(tmp_path / "m.onnx", location="w.bin", **entries))


def test_fingerprint_knows_weights_and_not_names(tmp_path: Path) -> None:
    graph = chain()
    same = model_fingerprint(graph)
    save_graph(graph, tmp_path / "a.onnx")
    renamed = load_graph(tmp_path / "a.onnx")
    for node in renamed.nodes:
        node.name += "!"
    for tensor in renamed.tensors().values():
        tensor.name += "?"
    assert model_fingerprint(renamed) == same
    assert model_fingerprint(chain(seed=1)) != same
    assert model_fingerprint(chain(dtype=np.float64)) != same


@pytest.mark.parametrize("count", [8, 5000])
def test_fingerprint_knows_which_weight_is_whose(tmp_path: Path, count: int) -> None:
    """Two weights of one shape trade places in the data file; the ONNX file stays as it is."""
    rng = seeded()
    first, second = rng.normal(size=(2, 512, count)).astype(np.float32)
    x = gs.Variable("x", np.float32, (512, count))
    middle, y = gs.Variable("m", np.float32, x.shape), gs.Variable("y", np.float32, x.shape)
    nodes = [gs.Node("Mul", inputs=[x, constant("a", first)], outputs=[middle])]
    nodes.append(gs.Node("Add", inputs=[middle, constant("b", second)], outputs=[y]))
    save_graph(gs.Graph(nodes, [x], [y], opset=17), tmp_path / "m.onnx")
    data = tmp_path / "m.onnx.data"
    before, stored = model_fingerprint(load_graph(tmp_path / "m.onnx")), data.read_bytes()
    places = [stored.index(each.tobytes()) for each in (first, second)]
    traded = bytearray(stored)
    for place, each in zip(places, (second, first), strict=True):
        traded[place : place + each.nbytes] = each.tobytes()
    data.write_bytes(traded)
    assert model_fingerprint(load_graph(tmp_path / "m.onnx")) != before


TYPES = {
    "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "int8": np.int8, "int64": np.int64,
    "bool": np.bool_, "int4": ml_dtypes.int4, "uint4": ml_dtypes.uint4,
}  # fmt: skip


@pytest.mark.parametrize("count", [3, 64, 300_001])
@pytest.mark.parametrize("dtype", TYPES)
def test_fingerprint_covers_every_value(tmp_path: Path, dtype: str, count: int) -> None:
    """The first, the last and any between, in memory, in the ONNX file and in external data: all three agree."""
    seed = int(np.random.default_rng().integers(1 << 30))
    print("seed", seed)
    rng = np.random.default_rng(seed)
    array = rng.integers(0, 2, count).astype(TYPES[dtype])
    seen = set()
    for place in (None, 0, count // 2, int(rng.integers(count)), count - 1):
        changed = array.copy()
        if place is not None:
            changed[place] = 1 - changed[place].astype(np.int64)
        graph = one_weight(changed)
        first = model_fingerprint(graph)
        for external in (True, False):
            save_graph(graph, tmp_path / "w.onnx", external=external)
            assert model_fingerprint(load_graph(tmp_path / "w.onnx")) == first
        seen.add((None if place is None else place, first))
    assert len({first for _, first in seen}) == len({place for place, _ in seen})
    assert model_fingerprint(one_weight(array.reshape(1, -1))) != model_fingerprint(one_weight(array))


def one_weight(array: np.ndarray) -> gs.Graph:
    weight = constant("w", array)
    y = gs.Variable("y", array.dtype, array.shape)
    return gs.Graph([gs.Node("Identity", inputs=[weight], outputs=[y])], [], [y], opset=21)


def test_fingerprint_sees_strings_typed_fields_and_subgraphs(tmp_path: Path) -> None:
    def model(text: str, value: float, inner: float) -> str:
        parsed = onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["": 17]> g (bool c) => (float[2] y, string[2] t) '
            f'<string[2] s = {{"same", "{text}"}}, float[2] w = {{1, {value}}}> {{'
            "t = Identity(s) y = If(c) <then_branch = a () => (float[2] b) { b = Identity(w) }, "
            f"else_branch = d () => (float[2] e) <float[2] v = {{{inner}, 2}}> {{ e = Identity(v) }}> }}"
        )
        onnx.save(parsed, tmp_path / "m.onnx")
        return model_fingerprint(load_graph(tmp_path / "m.onnx"))

    prints = [model("a", 0.5, 3), model("b", 0.5, 3), model("a", 0.25, 3), model("a", 0.5, 4)]
    assert len(set(prints)) == 4
    assert model("a", 0.5, 3) == prints[0]


def test_fingerprint_counts_what_is_tied_once_and_what_is_equal_twice() -> None:
    one, other = constant("a", np.arange(99)), constant("b", np.arange(99))

    def model(*weights: gs.Constant) -> str:
        y = gs.Variable("y", np.int64, [99])
        return model_fingerprint(gs.Graph([gs.Node("Sum", inputs=list(weights), outputs=[y])], [], [y], opset=21))

    assert model(one, one) == model(one) != model(one, other)


def test_an_output_that_several_passes_replace(tmp_path: Path) -> None:
    graph = chain()
    for number in range(3):
        (y,) = graph.outputs
        rename_output(graph, y, insert(graph, "Neg", [y], f"pass.{number}", dtype=np.float32))
    save_graph(graph, tmp_path / "m.onnx")
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)
    assert [tensor.name for tensor in load_graph(tmp_path / "m.onnx").outputs] == [chain().outputs[0].name]
