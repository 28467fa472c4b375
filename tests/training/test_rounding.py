"""Rounded products are those of the quantized graph in ONNX Runtime, and gradients pass them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import torch
import zoo
from seeds import seeded

from trimtab.compiler.targets import get_target
from trimtab.passes import Capability, PassContext, run_passes
from trimtab.passes.canonicalize import Canonicalize
from trimtab.passes.contract import Rounding
from trimtab.passes.dynamic_int8 import DynamicInt8
from trimtab.passes.graph import constant, load_graph, save_graph
from trimtab.training.rounding import rounded_activations, rounded_weight
from trimtab.training.torch_graph import GraphModule, learnable

SHAPES = {"up": (24, 32), "bias": (32,), "down": (32, 8)}


def ffn(rng: np.random.Generator) -> gs.Graph:
    """Two products without anything else that the pass would round."""
    text = """<ir_version: 10, opset_import: ["" : 23]>
    g (float[B, T, 24] x) => (float[B, T, 8] y) {
        p = MatMul(x, up)  h = Add(p, bias)  a = Gelu(h)  y = MatMul(a, down)
    }"""
    graph = gs.import_onnx(onnx.parser.parse_model(text))
    made = {n: constant(n, rng.standard_normal(s).astype(np.float32)) for n, s in SHAPES.items()}
    for node in graph.nodes:
        node.inputs = [made.get(tensor.name, tensor) for tensor in node.inputs]
    return graph


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("scales", "saturates"), [("tensor", True), ("tensor", False), ("row", False)])
def test_as_the_pass_rounds(scales: str, per_channel: bool, saturates: bool, tmp_path: Path) -> None:
    capability = get_target("onnxruntime").probe()
    if capability.saturates and not saturates and scales == "tensor":
        pytest.skip("eight bits saturate on this processor")
    capability = replace(capability, saturates=saturates)
    step = DynamicInt8.model_validate({"per_channel": per_channel, "scales": scales})
    rng = seeded()
    graph, x = ffn(rng), rng.standard_normal((3, 5, 24)).astype(np.float32)
    x *= 10.0 ** rng.integers(-2, 2, (3, 5, 1))  # as one tensor, small rows keep little
    exact = GraphModule(graph)
    ours = GraphModule(graph, train=learnable(graph), rounding=step.rounding(capability))
    run_passes(graph, [step], PassContext(capability=capability))
    save_graph(graph, tmp_path / "int8.onnx")
    session = ort.InferenceSession(str(tmp_path / "int8.onnx"), providers=["CPUExecutionProvider"])
    want = session.run(None, {"x": x})[0]
    rounded, dense = (module({"x": torch.from_numpy(x)})["y"] for module in (ours, exact))
    away = np.linalg.norm(dense.detach().numpy() - want)
    assert np.linalg.norm(rounded.detach().numpy() - want) < 0.2 * away  # a value in the middle may go the other way
    rounded.sum().backward()
    for parameter in ours.weights:
        assert parameter.grad is not None and parameter.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("family", "scales"), [("bert", "tensor"), ("llama", "tensor"), ("gpt2", "row"), ("bert", "row")]
)
def test_a_whole_model_as_the_pass_rounds_it(family: str, scales: str, tmp_path: Path) -> None:
    """Tables are rounded too, and each tensor once for all its readers."""
    capability = Capability(saturates=True)  # seven bits are right on every processor
    step = DynamicInt8.model_validate({"scales": scales})
    graph = load_graph(zoo.exported(family))
    run_passes(graph, [Canonicalize()], PassContext())
    exact, ours = GraphModule(graph), GraphModule(graph, rounding=step.rounding(capability))
    run_passes(graph, [step], PassContext(capability=capability))
    save_graph(graph, tmp_path / "int8.onnx")
    session = ort.InferenceSession(str(tmp_path / "int8.onnx"), providers=["CPUExecutionProvider"])
    away, rng = [], seeded()
    for _ in range(25):
        feeds = {n: v for n, v in zoo.feeds(family, 3, 11, rng).items() if n in exact.inputs}
        want = session.run(exact.outputs[:1], feeds)[0]
        tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
        rounded, dense = (module(tensors)[module.outputs[0]].numpy() for module in (ours, exact))
        away.append(np.linalg.norm(rounded - want) / np.linalg.norm(dense - want))
    # In one text of twelve a value in the middle of two levels goes the other way, and all behind it.
    assert np.median(away) < 1e-3


@pytest.mark.parametrize("product", ["w = Transpose<perm = [1, 0]>(stored)", "w = Cast<to = 1>(stored)"])
def test_weights_behind_other_nodes_are_rounded_as_the_pass_does(product: str) -> None:
    text = f"""<ir_version: 10, opset_import: ["" : 23]>
    g (float[B, 8] x) => (float[B, 8] y) {{ {product} y = MatMul(x, w) }}"""
    graph, rng = gs.import_onnx(onnx.parser.parse_model(text)), seeded()
    stored = constant("stored", rng.standard_normal((8, 8)).astype(np.float16 if "Cast" in product else np.float32))
    graph.nodes[0].inputs = [stored]
    x = {"x": torch.from_numpy(rng.standard_normal((5, 8)).astype(np.float32))}
    plain, rounded = GraphModule(graph)(x)["y"], GraphModule(graph, rounding=Rounding(64, True))(x)["y"]
    assert 1e-4 < (rounded - plain).norm() / plain.norm() < 0.1
    run_passes(graph, [DynamicInt8()], PassContext())
    assert [node.op for node in graph.nodes if "MatMul" in node.op] == ["MatMulInteger"]


def test_activations_as_onnx_rounds_them() -> None:
    x = torch.from_numpy(seeded().standard_normal((3, 5, 7)).astype(np.float32)) + 2
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[A, B, C] x) => (float[A, B, C] y) {
        q, scale, zero = DynamicQuantizeLinear(x)  y = DequantizeLinear(q, scale, zero)
    }"""
    for values in (x, -x.abs(), x - 2, torch.zeros_like(x)):
        session = ort.InferenceSession(onnx.parser.parse_model(text).SerializeToString())
        want = session.run(None, {"x": values.numpy()})[0]
        apart = (rounded_activations(values) - torch.from_numpy(want)).abs()
        assert (apart > 1e-6).float().mean() < 0.02  # a value in the middle of two levels may go either way
        assert apart.max() <= 1.001 * (values.max().clamp_min(0) - values.min().clamp_max(0)) / 255


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_are_integers_times_a_scale(axis: int) -> None:
    weight = torch.randn(6, 9)
    weight[:, 2] = weight[2] = 0
    for per_channel in (True, False):
        rounded = rounded_weight(weight, axis, Rounding(64, per_channel)).double()
        scale = (
            weight.double().abs().amax(1 - axis, keepdim=True) / 64 if per_channel else weight.double().abs().max() / 64
        )
        want = torch.where(scale > 0, (weight.double() / scale).round() * scale, 0)
        assert ((rounded - want).abs() > 1e-5).double().mean() < 0.02
        assert ((rounded - weight).abs() <= 0.501 * scale).all()


def test_gradients_go_straight_through() -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    x = torch.randn(5, 4, requires_grad=True)
    (rounded_activations(x).sum() + rounded_weight(weight, 1, Rounding(127, True)).sum()).backward()
    torch.testing.assert_close(weight.grad, torch.ones(4, 3))
    assert x.grad is not None and (x.grad == 1).float().mean() > 0.9  # the ends may fall outside by a rounding
