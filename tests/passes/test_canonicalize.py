"""canonicalize changes the graph's form and nothing else: results, outputs and weights on disk stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import zoo
from seeds import seeded

from trimtab.passes.canonicalize import Canonicalize
from trimtab.passes.contract import PassContext, PassResult
from trimtab.passes.graph import is_external, load_graph, save_graph

CASES = [(family, exporter) for family in zoo.FAMILIES for exporter in ("dynamo", "torchscript")]


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def canonical(graph: gs.Graph) -> PassResult:
    return Canonicalize().run(graph, PassContext())


def parsed(tmp_path: Path, text: str, header: str = "") -> Path:
    """A model file from ONNX text; `header` adds opset imports."""
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18{header}]> {text}')
    onnx.save(model, tmp_path / "before.onnx")
    return tmp_path / "before.onnx"


def check_same(before: Path, tmp_path: Path, feeds: dict[str, np.ndarray]) -> tuple[gs.Graph, PassResult]:
    """Canonicalize the file, compare its results, and return the new graph."""
    graph = load_graph(before)
    result = canonical(graph)
    save_graph(graph, tmp_path / "after.onnx")
    old, new = session(before), session(tmp_path / "after.onnx")
    assert onnx.load(tmp_path / "after.onnx").graph.output == onnx.load(before).graph.output
    for a, b in zip(old.run(None, feeds), new.run(None, feeds), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)
    return graph, result


def ops(graph: gs.Graph) -> list[str]:
    return [node.op for node in graph.nodes]


@pytest.mark.parametrize(("family", "exporter"), CASES)
def test_same_results_for_every_family(family: str, exporter: str, tmp_path: Path) -> None:
    path = zoo.exported(family, exporter)
    graph = load_graph(path)
    canonical(graph)
    save_graph(graph, tmp_path / "after.onnx")
    onnx.checker.check_model(str(tmp_path / "after.onnx"), full_check=True)
    old, new = session(path), session(tmp_path / "after.onnx")
    assert [(o.name, o.type, o.shape) for o in new.get_outputs()] == [
        (o.name, o.type, o.shape) for o in old.get_outputs()
    ]
    rng = seeded()
    for batch, tokens in ((1, 3), (3, 11)):
        feeds = zoo.feeds(family, batch, tokens, rng)
        for want, got in zip(old.run(None, feeds), new.run(None, feeds), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert not {"Constant", "Identity", "Dropout"} & set(ops(graph))


def test_genai_keeps_its_ops(tmp_path: Path) -> None:
    graph = load_graph(zoo.exported("llama", "genai"))
    before = {node.op for node in graph.nodes if node.domain}
    canonical(graph)
    assert {node.op for node in graph.nodes if node.domain} == before
    save_graph(graph, tmp_path / "after.onnx")
    session(tmp_path / "after.onnx")


@pytest.mark.parametrize("symbol", ["kv_cache_dim", "width", None])
def test_heads_of_a_cache_get_their_sizes(symbol: str | None) -> None:
    """The attention that reads them fixes number and width; other axes and names stay."""
    graph = load_graph(zoo.exported("llama", "genai"))
    for tensor in [*graph.inputs, *graph.outputs]:
        if tensor.name.startswith(("past", "present")):
            tensor.shape = [tensor.shape[0], "kv_heads", tensor.shape[2], symbol]
    canonical(graph)
    shapes = {tensor.name: list(tensor.shape) for tensor in [*graph.inputs, *graph.outputs]}
    for layer in range(2):
        for part in ("key", "value"):
            assert shapes[f"past_key_values.{layer}.{part}"] == ["batch_size", 2, "past_sequence_length", 16]
            last = 16 if symbol else None
            assert shapes[f"present.{layer}.{part}"] == ["batch_size", 2, "total_sequence_length", last]


def test_a_mask_of_four_axes_is_no_cache() -> None:
    """It is read by attention, too, but neither heads nor their width are its sizes."""
    graph = load_graph(zoo.exported("llama", "genai"))
    bias = gs.Variable("bias", np.float32, ["batch_size", "one", "sequence_length", "total_sequence_length"])
    graph.inputs.append(bias)
    for node in graph.nodes:
        if node.op == "GroupQueryAttention":
            node.inputs[10] = bias
    canonical(graph)
    assert bias.shape == ["batch_size", "one", "sequence_length", "total_sequence_length"]


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_gpt2_has_no_gemm_and_no_reshape_around_products(exporter: str) -> None:
    graph = load_graph(zoo.exported("gpt2", exporter))
    assert "Gemm" in ops(graph)
    assert canonical(graph).details["gemms"] == 8  # four projections in each of two layers
    assert "Gemm" not in ops(graph)


def test_dynamic_quantization_takes_the_result(tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    path = zoo.exported("bert")
    graph = load_graph(path)
    product = next(node for node in graph.nodes if node.op == "MatMul")
    product.outputs[0].shape = [7, 7, 7]  # as exporters leave it behind when they transpose a weight
    canonical(graph)
    save_graph(graph, tmp_path / "after.onnx")
    quantize_dynamic(tmp_path / "after.onnx", tmp_path / "int8.onnx")
    session(tmp_path / "int8.onnx")
    assert "MatMulInteger" in ops(load_graph(tmp_path / "int8.onnx"))


def test_constants_and_copies(tmp_path: Path) -> None:
    path = parsed(tmp_path, """
        agraph (float[N, 4] x) => (float[N, 4] y, float[N, 4] z) {
            one = Constant <value = float[1] {1.0}> ()
            half = Constant <value_float = 0.5> ()
            two = Add (one, one)
            a = Identity (x)
            b, mask = Dropout (a, half)
            c = Cast <to = 1> (b)
            d = Mul (c, two)
            e = Concat <axis = 0> (d)
            y = Identity (e)
            z = Relu (e)
        }""")  # fmt: skip
    graph, result = check_same(path, tmp_path, {"x": seeded().standard_normal((3, 4), np.float32)})
    assert sorted(ops(graph)) == ["Mul", "Relu"]
    nothing = dict.fromkeys(("biases", "gemms", "reshapes", "grids", "shared", "gates", "caches"), 0)
    assert result.details == {"constants": 2, "copies": 5, "folded": 1, **nothing}
    assert result.changed == 8


def test_what_must_stay(tmp_path: Path) -> None:
    path = parsed(tmp_path, """
        agraph (float[N, 4] x, bool on, int64[2] shape) => (float[N, 4] y, float16[N, 4] h, float[A, B] s) {
            y = Identity (x)
            h = Cast <to = 10> (x)
            s = Reshape (x, shape)
        }""")  # fmt: skip
    graph, result = check_same(
        path, tmp_path, {"x": np.ones((3, 4), np.float32), "on": np.array(True), "shape": np.array([6, 2])}
    )
    assert sorted(ops(graph)) == ["Cast", "Identity", "Reshape"]
    assert result.changed == 0
    assert [t.name for t in graph.inputs] == ["x", "on", "shape"]


@pytest.mark.parametrize(
    ("sizes", "gone"),
    [("b, t, four", True), ("b, any, four", True), ("b, t, any", True), ("t, b, four", False), ("b, any, two", False)],
)
def test_reshapes_to_the_same_shape_go(sizes: str, gone: bool, tmp_path: Path) -> None:
    path = parsed(tmp_path, f"""
        agraph (float[B, T, 4] x) => (float[P, Q, R] y)
        <int64[1] any = {{-1}}, int64[1] two = {{2}}, int64[1] four = {{4}}> {{
            b = Shape <start = 0, end = 1> (x)
            t = Shape <start = 1, end = 2> (x)
            s = Concat <axis = 0> ({sizes})
            r = Reshape (x, s)
            y = Neg (r)
        }}""")  # fmt: skip
    graph, result = check_same(path, tmp_path, {"x": seeded().standard_normal((2, 3, 4), np.float32)})
    assert ("Reshape" not in ops(graph)) == gone
    assert result.details["reshapes"] == int(gone)


def test_training_dropout_stays() -> None:
    model = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["" : 18]>
        agraph (float[N, 4] x) => (float[N, 4] y) <float r = {0.5}, bool t = {1}> {
            a = Dropout (x, r, t)
            y = Relu (a)
        }""")
    graph = gs.import_onnx(model)
    canonical(graph)
    assert "Dropout" in ops(graph)


def test_functions_and_subgraphs_survive(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["" : 18, "local" : 1]>
        agraph (float[N, 4] x, bool which) => (float[N, 4] y) {
            a = Identity (x)
            b = local.Twice (a)
            c = Identity (b)
            y = If (which) <
                then_branch = yes () => (float[N, 4] t) { t = Relu (c) },
                else_branch = no () => (float[N, 4] f) { f = Neg (a) }
            >
        }
        <domain: "local", opset_import: ["" : 18]> Twice (v) => (w) { w = Add (v, v) }""")
    onnx.save(model, tmp_path / "before.onnx")
    for which in (True, False):
        feeds = {"x": seeded().standard_normal((3, 4), np.float32), "which": np.array(which)}
        graph, _ = check_same(tmp_path / "before.onnx", tmp_path, feeds)
    assert sorted(ops(graph)) == ["If", "Twice"]
    assert [function.name for function in graph.functions] == ["Twice"]


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("n", [4, 6])
def test_gemm_between_reshapes(transposed: int, n: int, tmp_path: Path) -> None:
    rng = seeded()
    model = onnx.parser.parse_model(f"""<ir_version: 9, opset_import: ["" : 18]>
        agraph (float[B, T, 4] x) => (float[B, T, {n}] y) <int64[2] flat = {{-1, 4}}, int64[1] last = {{{n}}}> {{
            s = Shape <start = 0, end = 2> (x)
            back = Concat <axis = 0> (s, last)
            r = Reshape (x, flat)
            g = Gemm <transB = {transposed}> (r, w, bias)
            y = Reshape (g, back)
        }}""")
    for name, shape in (("w", (n, 4) if transposed else (4, n)), ("bias", (n,))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape, np.float32), name))
    onnx.save(model, tmp_path / "before.onnx")
    graph, result = check_same(tmp_path / "before.onnx", tmp_path, {"x": rng.standard_normal((2, 3, 4), np.float32)})
    assert result.details["gemms"] == 1
    assert [op for op in ops(graph) if op not in ("Shape", "Concat")] == ["Transpose"] * transposed + ["MatMul", "Add"]


def test_fused_bias_becomes_an_add(tmp_path: Path) -> None:
    path = parsed(tmp_path, """
        agraph (float[N, 4] x) => (float[N, 4] y, float[N, 4] z) <float[4] b = {0.5, -1, 2, 0}> {
            y = com.microsoft.BiasGelu (x, b)
            z = com.microsoft.FastGelu (x, b)
        }""", ', "com.microsoft" : 1')  # fmt: skip
    graph, result = check_same(path, tmp_path, {"x": seeded().standard_normal((3, 4), np.float32)})
    assert sorted(ops(graph)) == ["Add", "Add", "FastGelu", "Gelu"]
    assert result.details["biases"] == 2


def test_external_weights_stay_unread(tmp_path: Path) -> None:
    save_graph(load_graph(zoo.exported("gpt2", "torchscript")), tmp_path / "model.onnx")
    graph = load_graph(tmp_path / "model.onnx")
    held = {t.name for t in graph.tensors().values() if isinstance(t, gs.Constant) and is_external(t)}
    assert len(held) > 10
    canonical(graph)
    after = {t.name: t for t in graph.tensors().values() if isinstance(t, gs.Constant)}
    assert all(is_external(after[name]) for name in held & set(after))
    assert len(held & set(after)) >= 10  # the tied head's copy of the table is gone


GRID = """agraph (float[A, B] x, float[A, B] other) => (float[P, Q, R, S] y)
    <int64 zero = {0}, int64 one = {1}, int64[3] after = {1, 2, 3}, int64[3] before = {0, 1, 2}, int64[1] last = {4}> {
        rows = Shape <start = 0, end = 1> (other)
        columns = Shape <start = 1, end = 2> (other)
        n = Squeeze (rows)
        m = Squeeze (columns)
        i = Range (FIRST)
        j = Range (zero, m, one)
        down = Unsqueeze (i, DOWN)
        across = Unsqueeze (j, ACROSS)
        both = Max (down, across)
        shape = Shape (both)
        a = Expand (down, shape)
        b = Expand (across, shape)
        p = Unsqueeze (a, last)
        q = Unsqueeze (b, last)
        grid = Concat <axis = -1> (PAIR)
        picked = GatherND (x, grid)
        y = Neg (picked)
        }"""
PLAIN = {"FIRST": "zero, n, one", "DOWN": "after", "ACROSS": "before", "PAIR": "p, q"}


def grid(tmp_path: Path, **changed: str) -> Path:
    text = GRID
    for name, value in (PLAIN | changed).items():
        text = text.replace(name, value)
    return parsed(tmp_path, text)


def grid_feeds(rows: int, columns: int) -> dict[str, np.ndarray]:
    rng = seeded()
    return {name: rng.standard_normal((rows, columns), np.float32) for name in ("x", "other")}


def test_a_grid_of_all_indices_is_the_tensor_itself(tmp_path: Path) -> None:
    path = grid(tmp_path)
    for rows, columns in ((3, 5), (1, 4), (6, 1)):
        graph, result = check_same(path, tmp_path, grid_feeds(rows, columns))
        assert ops(graph) == ["Unsqueeze", "Neg"]
        assert result.details["grids"] == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"PAIR": "q, p"},  # reads x transposed
        {"FIRST": "one, n, one"},  # leaves the first row out
        {"FIRST": "zero, m, one"},  # as far as the other axis goes
        {"DOWN": "before", "ACROSS": "after"},  # puts columns before rows
    ],
)
def test_other_grids_stay(changed: dict[str, str], tmp_path: Path) -> None:
    graph, result = check_same(grid(tmp_path, **changed), tmp_path, grid_feeds(4, 4))
    assert "GatherND" in ops(graph)
    assert result.details["grids"] == 0


def test_masks_of_torch_exports_lose_their_grids() -> None:
    for family in ("bert", "roberta", "opt", "llama", "t5"):
        graph = load_graph(zoo.exported(family))
        assert "GatherND" in ops(graph)
        canonical(graph)
        assert "GatherND" not in ops(graph)
