"""Whole graphs in torch: equal to ONNX Runtime, differentiable, and refused with a reason."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import torch
import zoo
from seeds import seeded

from trimtab.passes.errors import ModelError
from trimtab.passes.graph import constant, load_graph, values
from trimtab.training.torch_graph import GraphModule, learnable


def run_torch(module: GraphModule, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = module({name: torch.from_numpy(value) for name, value in feeds.items()})
    return {name: value.detach().numpy() for name, value in out.items()}


def mlp(rng: np.random.Generator, dtype: type = np.float32) -> gs.Graph:
    """y = Gelu(x W_up + b_up) W_down + b_down, W_down stored transposed, then a norm."""
    text = """<ir_version: 10, opset_import: ["" : 23]>
    g (float[N, 6] x) => (float[N, 6] out) {
        p = MatMul(x, up_weight)  h = Add(p, up_bias)  a = Gelu(h)
        t = Transpose<perm = [1, 0]>(down_weight)  q = MatMul(a, t)  y = Add(down_bias, q)
        out = LayerNormalization(y, norm_scale, norm_bias)
    }"""
    graph = gs.import_onnx(onnx.parser.parse_model(text))
    shapes = {"up_weight": (6, 10), "up_bias": (10,), "down_weight": (6, 10), "down_bias": (6,)}
    shapes |= {"norm_scale": (6,), "norm_bias": (6,)}
    made = {name: constant(name, rng.standard_normal(shape).astype(dtype)) for name, shape in shapes.items()}
    for node in graph.nodes:
        node.inputs = [made.get(tensor.name, tensor) for tensor in node.inputs]
    return graph


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_families_as_in_onnx_runtime(family: str, exporter: str) -> None:
    path = zoo.exported(family, exporter)
    graph = load_graph(path)
    names = learnable(graph)
    module = GraphModule(graph, train=names)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch, tokens in ((1, 3), (3, 11)):
        feeds = zoo.feeds(family, batch, tokens, seeded())
        feeds = {name: feeds[name] for name in module.inputs}
        want = dict(zip(module.outputs, session.run(module.outputs, feeds), strict=True))
        for name, have in run_torch(module, feeds).items():
            np.testing.assert_allclose(have, want[name], rtol=1e-4, atol=2e-5)
    sum(value.sum() for value in module({k: torch.from_numpy(v) for k, v in feeds.items()}).values()).backward()
    reached = [name for name, p in zip(module.trained, module.weights, strict=True) if p.grad is not None]
    assert reached == names


def test_model_of_onnx_runtime_genai_with_padded_rows() -> None:
    path = zoo.exported("llama", "genai")
    graph = load_graph(path)
    module = GraphModule(graph, train=learnable(graph), outputs=["logits"])
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng = seeded()
    mask = np.ones((3, 7), np.int64)
    mask[1, 4:] = mask[2, 1:] = 0
    feeds: dict[str, np.ndarray] = {"input_ids": rng.integers(3, 90, (3, 7)), "attention_mask": mask}
    caches = [tensor.name for tensor in graph.inputs if tensor.name.startswith("past")]
    feeds |= {name: np.zeros((3, 2, 0, 16), np.float32) for name in caches}
    (want,) = session.run(["logits"], feeds)
    have = run_torch(module, feeds)["logits"]
    np.testing.assert_allclose(have[mask > 0], want[mask > 0], rtol=1e-4, atol=2e-5)


def test_learnable_are_weights_biases_and_norms() -> None:
    graph = mlp(seeded())
    assert learnable(graph) == ["up_weight", "up_bias", "down_weight", "down_bias", "norm_scale", "norm_bias"]


def test_embedding_tables_are_left_out() -> None:
    graph = load_graph(zoo.exported("gpt2"))
    tables = {
        node.inputs[0].name for node in graph.nodes if node.op == "Gather" and isinstance(node.inputs[0], gs.Constant)
    }
    assert tables
    assert not tables & set(learnable(graph))


def test_gradients_are_those_of_differences() -> None:
    graph = mlp(seeded(), np.float64)
    for tensor in (*graph.inputs, *graph.outputs):
        tensor.dtype = np.dtype(np.float64)
    module = GraphModule(graph, train=learnable(graph))
    x = torch.randn(5, 6, dtype=torch.float64)

    def loss(*weights: torch.Tensor) -> torch.Tensor:
        out = torch.func.functional_call(module, dict(zip(names, weights, strict=True)), ({"x": x},))
        return out["out"].pow(3).sum()

    names = [name for name, _ in module.named_parameters()]
    weights = tuple(p.detach().clone().requires_grad_() for p in module.parameters())
    assert torch.autograd.gradcheck(loss, weights)


def test_weights_come_back_as_they_were_and_in_their_types() -> None:
    graph = mlp(seeded(), np.float16)
    module = GraphModule(graph, train=learnable(graph))
    tensors = graph.tensors()
    for name, value in module.learned().items():
        assert value.dtype == np.float16
        np.testing.assert_array_equal(value, values(tensors[name]))


def test_inner_tensors_can_be_asked_for_and_the_rest_is_not_run() -> None:
    graph = mlp(seeded())
    x = seeded().standard_normal((4, 6)).astype(np.float32)
    both = run_torch(GraphModule(graph, outputs=["p", "h"]), {"x": x})
    w, b = (values(graph.tensors()[name]) for name in ("up_weight", "up_bias"))
    np.testing.assert_allclose(both["p"], x @ w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(both["h"], x @ w + b, rtol=1e-4, atol=1e-5)
    graph.nodes[-1].op = "Unheard"  # behind h: not needed for it
    np.testing.assert_allclose(
        run_torch(GraphModule(graph, outputs=["h"]), {"x": x})["h"], both["h"], rtol=1e-4, atol=1e-5
    )


def test_quantized_weights_run_dequantized() -> None:
    rng = seeded()
    text = """<ir_version: 10, opset_import: ["" : 23]>
    g (float[N, 6] x) => (float[N, 4] y) <int8[6, 4] w, float[4] s, float[4] b> {
        d = DequantizeLinear<axis = 1>(w, s)  p = MatMul(x, d)  y = Add(p, b)
    }"""
    graph = gs.import_onnx(onnx.parser.parse_model(text))
    arrays = {
        "w": rng.integers(-100, 100, (6, 4)).astype(np.int8),
        "s": rng.uniform(0.1, 1, 4).astype(np.float32),
        "b": rng.standard_normal(4).astype(np.float32),
    }
    for node in graph.nodes:
        node.inputs = [constant(t.name, arrays[t.name]) if t.name in arrays else t for t in node.inputs]
    assert learnable(graph) == ["b"]
    x = rng.standard_normal((3, 6)).astype(np.float32)
    have = run_torch(GraphModule(graph, train=["b"]), {"x": x})["y"]
    np.testing.assert_allclose(have, x @ (arrays["w"] * arrays["s"]) + arrays["b"], rtol=1e-4, atol=1e-4)


def test_unknown_operator_is_named_with_its_node() -> None:
    graph = mlp(seeded())
    graph.nodes[2].op, graph.nodes[2].name, graph.nodes[2].domain = "Wavelet", "block/act", "my.ops"
    with pytest.raises(ModelError, match=r"block/act.*my\.ops::Wavelet.*training does not know this operator"):
        GraphModule(graph)


def test_unknown_attribute_is_named() -> None:
    graph = mlp(seeded())
    graph.nodes[2].attrs["sharpness"] = 2
    with pytest.raises(ModelError, match=r"Gelu.*attribute 'sharpness'"):
        GraphModule(graph)


def test_failure_at_run_time_names_the_node() -> None:
    with pytest.raises(ModelError, match=r"'h' \(Add\)"):
        run_torch(GraphModule(mlp(seeded())), {"x": np.zeros((2, 5), np.float32)})
