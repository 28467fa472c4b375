"""Weights that passes make lie in a file until the graph is saved, and not in memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from rewrite import profile_of
from seeds import seeded

from trimtab.passes import PassContext, run_passes
from trimtab.passes.ffn_topk.topk import FFNTopK
from trimtab.passes.graph import constant, insert, is_external, is_new, load_graph, save_graph, scratch, values

BIG, SMALL = (512, 1024), (4, 1024)


def graph_of(*weights: gs.Constant) -> gs.Graph:
    x = gs.Variable("x", np.float32, ["tokens", 1024])
    graph = gs.Graph(inputs=[x], opset=21, name="sums")
    graph.outputs = [insert(graph, "MatMul", [x, w], f"y{i}", dtype=np.float32) for i, w in enumerate(weights)]
    return graph


def test_large_weights_lie_in_the_file_and_are_saved(tmp_path: Path) -> None:
    rng = seeded()
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in (BIG, SMALL, BIG)]
    with scratch(tmp_path):
        made = [constant(f"w{i}", array.T) for i, array in enumerate(arrays)]
        assert [is_external(w) for w in made] == [True, False, True]
        assert all(is_new(w) for w in made)
        for w, array in zip(made, arrays, strict=True):
            np.testing.assert_array_equal(values(w), array.T)
        save_graph(graph_of(*made), tmp_path / "saved.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved.onnx", "saved.onnx.data"]
    loaded = {t.name: t for t in load_graph(tmp_path / "saved.onnx").tensors().values() if isinstance(t, gs.Constant)}
    for i, array in enumerate(arrays):
        np.testing.assert_array_equal(values(loaded[f"w{i}"]), array.T)


def test_types_that_numpy_lacks(tmp_path: Path) -> None:
    packed = seeded().integers(0, 256, 1 << 21).astype(np.uint8)
    proto = onnx.helper.make_tensor("q", onnx.TensorProto.INT4, (2048, 2048), packed.tobytes(), raw=True)
    with scratch(tmp_path):
        w = constant("q", proto)
        assert is_external(w)
        assert w._values.raw().tobytes() == packed.tobytes()


def test_without_a_file_they_stay_in_memory_and_those_of_a_source_are_not_new(tmp_path: Path) -> None:
    w = constant("w", np.ones((1024, 512), np.float32))
    assert not is_external(w) and is_new(w)
    save_graph(graph_of(w), tmp_path / "source.onnx")
    (kept,) = (t for t in load_graph(tmp_path / "source.onnx").tensors().values() if isinstance(t, gs.Constant))
    with scratch(tmp_path):
        assert not is_new(kept)


def test_the_file_goes_with_an_error(tmp_path: Path) -> None:
    try:
        with scratch(tmp_path):
            constant("w", np.ones(BIG, np.float32))
            raise RuntimeError
    except RuntimeError:
        pass
    assert not list(tmp_path.iterdir())


def test_a_pass_that_replaces_all_weights_holds_few_of_them(tmp_path: Path) -> None:
    """Of twelve FFNs, 151 MB of weights, one layer in its several copies is in memory at a time."""
    width, neurons, layers = 512, 2048, 12
    rng = np.random.default_rng(0)
    x = gs.Variable("x", np.float32, ["tokens", width])
    graph = gs.Graph(inputs=[x], opset=21, name="ffns")
    for i in range(layers):
        shapes = {"gate": (width, neurons), "up": (width, neurons), "down": (neurons, width)}
        made = {name: rng.standard_normal(shape, np.float32) / 32 for name, shape in shapes.items()}
        gate, up, down = (gs.Constant(f"{i}/{name}", w) for name, w in made.items())
        g = insert(graph, "MatMul", [x, gate], f"{i}/g", dtype=np.float32)
        s = insert(graph, "Sigmoid", [g], f"{i}/s", dtype=np.float32)
        a = insert(graph, "Mul", [g, s], f"{i}/a", dtype=np.float32)
        u = insert(graph, "MatMul", [x, up], f"{i}/u", dtype=np.float32)
        h = insert(graph, "Mul", [a, u], f"{i}/h", dtype=np.float32)
        y = insert(graph, "MatMul", [h, down], f"{i}/y", dtype=np.float32)
        x = insert(graph, "Add", [x, y], f"{i}/x", dtype=np.float32)
        for tensor in (g, s, a, u, h, y, x):
            tensor.shape = ["tokens", width if tensor in (y, x) else neurons]
    graph.outputs = [x]
    save_graph(graph, tmp_path / "source.onnx")
    profile = profile_of(graph)
    del graph, gate, up, down, made
    source = load_graph(tmp_path / "source.onnx")
    tracemalloc.start()
    try:
        with scratch(tmp_path):
            (result,) = run_passes(source, [FFNTopK(density=1.0)], PassContext(profile))
            _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert result.changed == layers
    assert peak < 0.5 * 4 * 3 * width * neurons * layers
