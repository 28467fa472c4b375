"""Models by hand whose layers share weights, as in a Universal Transformer, in the forms that exporters write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Layout = Literal["same", "copied", "transposed", "transposed copies", "gemm"]
LAYOUTS: tuple[Layout, ...] = ("same", "copied", "transposed", "transposed copies", "gemm")


@dataclass(frozen=True)
class Shape:
    """Of a model: x [batch, tokens, width] → layers of norm, FFN and residual → y, of the same shape.

    Attributes:
        groups: sets of weights, which the layers take in turns.
        layout: how an exporter holds what layers share.
    """

    layers: int = 4
    groups: int = 1
    width: int = 64
    neurons: int = 96
    gated: bool = False
    activation: Literal["Relu", "Gelu", "Sigmoid"] = "Gelu"
    layout: Layout = "same"
    own_biases: bool = False

    @property
    def products(self) -> int:
        return self.layers * (3 if self.gated else 2)

    @property
    def matrices(self) -> int:
        """Distinct ones."""
        return self.groups * (3 if self.gated else 2)

    @property
    def ffn_bytes(self) -> int:
        """Of all distinct matrices in fp32."""
        return 4 * self.matrices * self.width * self.neurons

    def states(self, seed: int) -> np.ndarray:
        """A random x."""
        rows = (7,) if self.layout == "gemm" else (2, 4)
        return np.random.default_rng(seed).standard_normal((*rows, self.width)).astype(np.float32)


def write(path: Path, shape: Shape, seed: int) -> Path:
    """An ONNX file of random weights."""
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {"scale": rng.normal(1, 0.1, shape.width).astype(np.float32)}
    nodes: list[Any] = []
    sets = [_set(rng, shape) for _ in range(shape.groups)]
    for i in range(shape.layers):
        g = i % shape.groups
        nodes.append(helper.make_node("LayerNormalization", [f"x{i}", "scale"], [f"n{i}"]))
        hidden = []
        for label in ("gate", "up") if shape.gated else ("up",):
            product = _product(nodes, weights, shape, f"n{i}", sets[g][label], f"{label}.{g}", i)
            bias = f"{label}_bias{i if shape.own_biases else g}"
            weights.setdefault(bias, (sets[g][f"{label}_bias"] + (i if shape.own_biases else 0)).astype(np.float32))
            nodes.append(helper.make_node("Add", [product, bias], [f"{label}{i}"]))
            hidden.append(f"{label}{i}")
        nodes.append(helper.make_node(shape.activation, hidden[:1], [f"a{i}"]))
        if shape.gated:
            nodes.append(helper.make_node("Mul", [f"a{i}", hidden[1]], [f"h{i}"]))
        down = _product(nodes, weights, shape, f"h{i}" if shape.gated else f"a{i}", sets[g]["down"], f"down.{g}", i)
        nodes.append(helper.make_node("Add", [f"x{i}", down], [f"x{i + 1}" if i + 1 < shape.layers else "y"]))
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    rows = ["rows"] if shape.layout == "gemm" else ["batch", "tokens"]  # a Gemm takes rows alone
    sides = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [*rows, shape.width])] for name in ("x0", "y")]
    graph = helper.make_graph(nodes, "net", *sides, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def _set(rng: np.random.Generator, shape: Shape) -> dict[str, np.ndarray]:
    d, f = shape.width, shape.neurons
    found = {"down": rng.normal(0, f**-0.5, (f, d))}
    for label in ("gate", "up"):
        found |= {label: rng.normal(0, d**-0.5, (d, f)), f"{label}_bias": rng.normal(0, 0.3, f)}
    return {name: value.astype(np.float32) for name, value in found.items()}


def _product(
    nodes: list[Any], weights: dict[str, np.ndarray], shape: Shape, x: str, w: np.ndarray, name: str, layer: int
) -> str:
    """Nodes for x w in the layout; returns the name of the product."""
    y, copy = f"{name}_{layer}", f"{name}_weight_{layer}"
    if shape.layout in ("same", "copied"):
        held = copy if shape.layout == "copied" else name
        weights.setdefault(held, w)
        nodes.append(helper.make_node("MatMul", [x, held], [y]))
    elif shape.layout == "gemm":
        weights[copy] = np.ascontiguousarray(w.T)
        nodes.append(helper.make_node("Gemm", [x, copy], [y], transB=1))
    else:
        held = copy if shape.layout == "transposed copies" else name
        weights.setdefault(held, np.ascontiguousarray(w.T))
        nodes.append(helper.make_node("Transpose", [held], [f"{y}_t"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", [x, f"{y}_t"], [y]))
    return y
