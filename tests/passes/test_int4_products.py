"""Products with int4 weights as Int4Linear: the same integers and scales, wherever they came from."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
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
from trimtab.passes.graph.linear import match_linear
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


def dequantized(
    graph: gs.Graph, matrix: Quantized, attrs: dict[str, Any] | None = None, zeros: bool = False
) -> gs.Tensor:
    """W [in_features, out_features] of int4 integers, by DequantizeLinear."""
    q = helper.make_tensor("", TensorProto.INT4, matrix.q.shape, pack(matrix.q, 4), raw=True)
    parts = [constant("q", q), constant("scale", matrix.scale)]
    if zeros:
        ones = np.ones(matrix.scale.shape, np.int8)
        parts.append(constant("z", helper.make_tensor("", TensorProto.INT4, ones.shape, pack(ones, 4), raw=True)))
    attrs = {"axis": 0, "block_size": matrix.block} | attrs
    return insert(graph, "DequantizeLinear", parts, "w", attrs=attrs, dtype=np.float32)


def left_alone(graph: gs.Graph) -> bool:
    return use_int4_linear(graph) == 0 and "Int4Linear" not in ops(graph)


@pytest.mark.parametrize("what", ["int8", "blocks of 16", "half"])
def test_other_forms_stay(what: str) -> None:
    rng = seeded()
    graph = graph_of(exact((1, 64), rng))
    matrix = matrix_of(64, 8, rng, 16 if what == "blocks of 16" else 32, 8 if what == "int8" else 4)
    dtype = np.dtype(np.float16 if what == "half" else np.float32)
    graph.outputs = [matrix.store("w", dtype)(graph, graph.inputs[0], "y")]
    assert left_alone(graph)


@pytest.mark.parametrize("what", ["zero points", "read twice", "an output", "Gemm", "by outputs", "of another type"])
def test_what_onnx_runtime_multiplies_in_floats_stays(what: str) -> None:
    """So that x is rounded nowhere where it was not."""
    rng = seeded()
    graph, matrix = graph_of(exact((1, 64), rng)), matrix_of(64, 64, rng)
    attrs: dict[str, Any] = {"by outputs": {"axis": 1}, "of another type": {"output_dtype": 1}}.get(what, {})
    w = dequantized(graph, matrix, attrs, zeros=what == "zero points")
    if what == "by outputs":
        w.inputs[0].inputs[1].values = np.ascontiguousarray(matrix.scale.T)
        w = insert(graph, "Transpose", [w], "w_t", attrs={"perm": [1, 0]}, dtype=np.float32)
    op = "Gemm" if what == "Gemm" else "MatMul"
    graph.outputs = [insert(graph, op, [graph.inputs[0], w], "y", dtype=np.float32)]
    if what == "read twice":
        graph.outputs.append(insert(graph, op, [graph.inputs[0], w], "z", dtype=np.float32))
    if what == "an output":
        graph.outputs.append(w)
    assert left_alone(graph)


@pytest.mark.parametrize("attrs", [{"accuracy_level": 0}, {"bits": 2}, {"block_size": 16}, {"K": 48}])
def test_other_blocks_stay(attrs: dict[str, int]) -> None:
    graph = graph_of(exact((1, 64), seeded()))
    graph.outputs = [matrix_of(64, 8, seeded()).store("w", np.dtype(np.float32), 2)(graph, graph.inputs[0], "y")]
    graph.nodes[0].attrs |= attrs
    assert left_alone(graph)


def test_of_old_models_nothing_is_changed() -> None:
    """What would have to be raised to the opset of the op's body may mean something else there."""
    graph = graph_of(exact((1, 64), seeded()))
    graph.outputs = [matrix_of(64, 8, seeded()).store("w", np.dtype(np.float32), 2)(graph, graph.inputs[0], "y")]
    graph.opset = 12
    assert left_alone(graph) and graph.opset == 12


def test_bits_are_four_unless_said() -> None:
    rng = seeded()
    x, matrix = exact((2, 64), rng), matrix_of(64, 8, rng)
    graph = graph_of(x)
    graph.outputs = [matrix.store("w", np.dtype(np.float32), 2)(graph, graph.inputs[0], "y")]
    del graph.nodes[0].attrs["bits"]
    assert use_int4_linear(graph) == 1
    same(ran(graph, x)[0], x, matrix.array)


@pytest.mark.parametrize("shape", [(1, 9), (1, 1, 9), (9, 1), (1,)])
def test_only_a_vector_is_a_bias(shape: tuple[int, ...]) -> None:
    """Others may give the sum another shape, or be added along another axis."""
    rng = seeded()
    x, matrix = exact((9, 64), rng), matrix_of(64, 9, rng)
    added = rng.standard_normal(shape).astype(np.float32)
    graph = graph_of(x)
    y = matrix.store("w", np.dtype(np.float32))(graph, graph.inputs[0], "y")
    graph.outputs = [insert(graph, "Add", [y, constant("b", added)], "sum", dtype=np.float32)]
    assert use_int4_linear(graph) == 1 and ops(graph) == {"Int4Linear": 1, "Add": 1}
    (found,) = ran(graph, x)
    wanted = x.astype(np.float64) @ matrix.array + added
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-3)


def test_a_sum_that_is_read_elsewhere_keeps_its_product() -> None:
    rng = seeded()
    x, matrix = exact((2, 64), rng), matrix_of(64, 9, rng)
    graph, bias = graph_of(x), rng.standard_normal(9).astype(np.float32)
    y = matrix.store("w", np.dtype(np.float32))(graph, graph.inputs[0], "y")
    graph.outputs = [y, insert(graph, "Add", [y, constant("b", bias)], "sum", dtype=np.float32)]
    assert use_int4_linear(graph) == 1
    product, total = ran(graph, x)
    same(product, x, matrix.array)
    np.testing.assert_allclose(total, product + bias, rtol=1e-6, atol=1e-4)


def test_scales_that_products_of_other_blocks_share() -> None:
    """The same numbers for 64 inputs in blocks of 32 and 128 in blocks of 64, as MatMulNBits."""
    rng = seeded()
    small, x = matrix_of(64, 8, rng), exact((3, 64), rng)
    large = Quantized(rng.integers(-8, 8, (128, 8)).astype(np.int8), small.scale, 4, 64)
    graph = graph_of(x)
    y = small.store("a", np.dtype(np.float32), 2)(graph, graph.inputs[0], "y")
    x2 = insert(graph, "Concat", [graph.inputs[0]] * 2, "x2", attrs={"axis": -1}, dtype=np.float32)
    z = large.store("b", np.dtype(np.float32), 2)(graph, x2, "z")
    z.inputs[0].inputs[2] = y.inputs[0].inputs[2]
    graph.outputs = [y, z]
    assert use_int4_linear(graph) == 2
    first, second = ran(graph, x)
    same(first, x, small.array)
    same(second, np.concatenate([x, x], -1), large.array)


def test_beside_products_that_have_it_already() -> None:
    """Of one form: a model has one body of an op."""
    rng = seeded()
    x, matrix = exact((2, 64), rng), matrix_of(64, 9, rng)
    long = Quantized(matrix.q, matrix.scale * np.float32(1.001), 4, 32)
    for first, second, made in ((matrix, matrix, 1), (long, matrix, 1), (matrix, long, 0)):
        graph = graph_of(x)
        graph.outputs = [first.store("a", np.dtype(np.float32))(graph, graph.inputs[0], "y")]
        assert use_int4_linear(graph) == 1
        graph.outputs.append(second.store("b", np.dtype(np.float32))(graph, graph.inputs[0], "z"))
        assert use_int4_linear(graph) == made
        for y, m in zip(ran(graph, x), (first, second), strict=True):
            assert np.abs(y - x.astype(np.float64) @ m.array).max() <= 0.01 * np.abs(y).max()


def test_is_read_as_the_linear_that_it_is() -> None:
    """So that `inspect` and passes see the layers of a build."""
    rng = seeded()
    graph, matrix = graph_of(exact((1, 96), rng)), matrix_of(96, 7, rng)
    y = matrix.store("w", np.dtype(np.float32))(graph, graph.inputs[0], "y")
    bias = rng.standard_normal(7).astype(np.float32)
    graph.outputs = [insert(graph, "Add", [y, constant("b", bias)], "sum", dtype=np.float32)]
    use_int4_linear(graph)
    linear = match_linear(graph.nodes[0])
    assert linear is not None and linear.quantized is graph.nodes[0]
    assert (linear.in_features, linear.out_features) == (96, 7)
    np.testing.assert_array_equal(linear.w(), matrix.array)
    np.testing.assert_array_equal(linear.b(), bias)


def test_builds_have_it_where_there_is_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.save_pretrained("llama", tmp_path / "llama")
    recipe = {"passes": [{"weight-only": {"bits": 4}}], "workload": {"batch": [1, 1, 2], "tokens": [1, 4, 24]}}
    ids = np.arange(1, 9)[None]
    logits, found, capability = {}, {}, target._probe()
    for name in ("kernel", "none"):
        if name == "none":
            monkeypatch.setattr(target, "_probe", lambda: replace(capability, int4_kernel=False))
        build = compile_model(tmp_path / "llama", recipe, tmp_path / name)
        found[name] = ops(load_graph(build.path / "model" / "model.onnx"))
        logits[name] = load(build.path).runner.steps(1, ids.size).run(ids, np.ones_like(ids))
    assert found["kernel"]["Int4Linear"] > 3 and not found["kernel"]["DequantizeLinear"]
    assert found["none"]["DequantizeLinear"] == found["kernel"]["Int4Linear"]
    off = np.abs(logits["kernel"] - logits["none"]).max()
    assert off <= 0.01 * np.abs(logits["none"]).max()  # both round x by blocks of 32
