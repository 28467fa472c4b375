"""Products with int4 weights as Int4Linear: the same integers and scales, wherever they came from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import zoo
from dialects import native
from onnx import TensorProto, helper
from seeds import seeded

from trimtab.compiler import compile_model, load
from trimtab.compiler.targets import onnxruntime as target
from trimtab.passes.graph import constant, insert, load_graph
from trimtab.passes.matrices.forms import Quantized, pack
from trimtab.passes.matrices.quantize import round_to_nearest
from trimtab.passes.settle import use_int4_linear


def exact(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Integers of which each block of 32 has the largest, so that rounding leaves them."""
    x = rng.integers(-127, 128, shape)
    x[..., ::32] = 127
    return x.astype(np.float32)


def graph_of(x: np.ndarray) -> gs.Graph:
    return gs.Graph(inputs=[gs.Variable("x", np.float32, [None, x.shape[-1]])], opset=21, ir_version=10)


def ran(graph: gs.Graph, x: np.ndarray) -> list[np.ndarray]:
    return list(native(gs.export_onnx(graph)).run(None, {"x": x}))


def ops(graph: gs.Graph) -> Counter[str]:
    return Counter(node.op for node in graph.nodes)


def matrix_of(width: int, columns: int, rng: np.random.Generator, block: int = 32, bits: int = 4) -> Quantized:
    return round_to_nearest(rng.standard_normal((width, columns)).astype(np.float32), bits, block, by_largest=True)


def same(y: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    wanted = x.astype(np.float64) @ w
    assert np.all(np.abs(y - wanted) <= 1e-6 * (np.abs(x).astype(np.float64) @ np.abs(w) + 1))


@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize("block", [32, 64])
def test_integers_and_scales_stay(block: int, uses: int) -> None:
    """Of one product and of two that share a matrix, of which one has a bias."""
    rng = seeded()
    x, matrix = exact((5, 128), rng), matrix_of(128, 45, rng, block)
    bias = rng.standard_normal(45).astype(np.float32)
    graph = graph_of(x)
    product = matrix.store("w", np.dtype(np.float32), uses)
    graph.outputs = [product(graph, graph.inputs[0], f"y{i}") for i in range(uses)]
    graph.outputs[0] = insert(graph, "Add", [graph.outputs[0], constant("b", bias)], "sum", dtype=np.float32)
    assert use_int4_linear(graph) == uses
    assert ops(graph) == {"Int4Linear": uses}
    weights = {id(node.inputs[1]) for node in graph.nodes}
    assert len(weights) == 1
    y = ran(graph, x)
    same(y[0] - bias, x, matrix.array)
    if uses == 2:
        same(y[1], x, matrix.array)


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_weights_that_lie_by_outputs(op: str) -> None:
    rng = seeded()
    x, matrix = exact((3, 96), rng), matrix_of(96, 21, rng)
    graph = graph_of(x)
    q = constant("q", helper.make_tensor("", TensorProto.INT4, (21, 96), pack(matrix.q.T, 4), raw=True))
    attrs = {"axis": 1, "block_size": 32}
    scale = constant("scale", np.ascontiguousarray(matrix.scale.T))
    w = insert(graph, "DequantizeLinear", [q, scale], "w", attrs=attrs, dtype=np.float32)
    if op == "MatMul":
        w = insert(graph, "Transpose", [w], "w_t", attrs={"perm": [1, 0]}, dtype=np.float32)
    more: dict[str, Any] = {"attrs": {"transB": 1}} if op == "Gemm" else {}
    graph.outputs = [insert(graph, op, [graph.inputs[0], w], "y", dtype=np.float32, **more)]
    assert use_int4_linear(graph) == 1
    same(ran(graph, x)[0], x, matrix.array)


def test_scales_are_short_where_that_holds_all_of_them() -> None:
    rng = seeded()
    x, matrix = exact((2, 64), rng), matrix_of(64, 9, rng)
    for long in (False, True):
        graph = graph_of(x)
        other = Quantized(matrix.q, matrix.scale * np.float32(1.001) if long else matrix.scale, 4, 32)
        graph.outputs = [m.store(f"w{i}", np.dtype(np.float32))(graph, graph.inputs[0], f"y{i}")
                         for i, m in enumerate((matrix, other))]  # fmt: skip
        assert use_int4_linear(graph) == 2
        assert {str(node.inputs[2].dtype) for node in graph.nodes} == {"float32" if long else "bfloat16"}
        for y, m in zip(ran(graph, x), (matrix, other), strict=True):
            same(y, x, m.array)


@pytest.mark.parametrize("what", ["int8", "blocks of 16", "zero points", "half", "as they are"])
def test_other_products_stay(what: str) -> None:
    rng = seeded()
    graph = graph_of(exact((1, 64), rng))
    matrix = matrix_of(64, 8, rng, 16 if what == "blocks of 16" else 32, 8 if what == "int8" else 4)
    dtype = np.dtype(np.float16 if what == "half" else np.float32)
    y = matrix.store("w", dtype, 2 if what == "as they are" else 1)(graph, graph.inputs[0], "y")
    if what == "zero points":
        zeros = helper.make_tensor("", TensorProto.INT4, (2, 8), pack(np.ones((2, 8), np.int8), 4), raw=True)
        graph.nodes[0].inputs.append(constant("zeros", zeros))
    if what == "as they are":
        graph.nodes[0].attrs["accuracy_level"] = 0  # x is not to be rounded
    graph.outputs = [y]
    assert use_int4_linear(graph) == 0
    assert "Int4Linear" not in ops(graph)


def test_builds_have_it_where_there_is_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.save_pretrained("llama", tmp_path / "llama")
    recipe = {"passes": [{"weight-only": {"bits": 4}}], "workload": {"batch": [1, 1, 2], "tokens": [1, 4, 24]}}
    ids = np.arange(1, 9)[None]
    logits, found = {}, {}
    for name in ("kernel", "none"):
        if name == "none":
            monkeypatch.setattr(target, "has_kernel", lambda op: False)
        build = compile_model(tmp_path / "llama", recipe, tmp_path / name)
        found[name] = ops(load_graph(build.path / "model" / "model.onnx"))
        logits[name] = load(build.path).runner.steps(1, ids.size).run(ids, np.ones_like(ids))
    assert found["kernel"]["Int4Linear"] > 3 and not found["kernel"]["DequantizeLinear"]
    assert found["none"]["DequantizeLinear"] == found["kernel"]["Int4Linear"]
    off = np.abs(logits["kernel"] - logits["none"]).max()
    assert off <= 0.01 * np.abs(logits["none"]).max()  # both round x by blocks of 32
