"""Products with weights as the op Int8Linear, in which each row of activations has a scale of its own."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.graph import constant, insert, output_name_of, values
from trimtab.passes.graph.linear import Linear, match_linear
from trimtab.passes.graph.opset import raise_opset
from trimtab.passes.graph.widen import HALF
from trimtab.plugins import INT8_LINEAR, add_node
from trimtab.plugins.dialect import OPSET
from trimtab.plugins.int8_linear import LARGEST, NUMBERS, WIDEST
from trimtab.plugins.lowering import onnx_type, type_of

__all__ = ["to_int8_rows"]

_SINGLE = {("Relu", ""): "relu", ("Sigmoid", ""): "sigmoid", ("Tanh", ""): "tanh", ("Gelu", "none"): "gelu",
           ("Gelu", "tanh"): "gelu_tanh"}  # fmt: skip
"""Activations that are one node: op and the attribute `approximate`."""

_End = tuple[str, gs.Tensor]
"""Name of the activation after a product, and its output."""


def to_int8_rows(graph: gs.Graph, name: str, *, per_channel: bool, leave: Iterable[gs.Node] = ()) -> int:
    """Replace every MatMul with a constant float weight, its bias and its activation by an Int8Linear.

    Weights that several products share are rounded and stored once. Weights are read one at a time.

    Args:
        name: name of the pass, the prefix of new names.
        per_channel: one scale per output feature instead of one per matrix.
        leave: nodes that stay in floating point.

    Returns:
        number of Int8Linear nodes.
    """
    left = {id(node) for node in leave}
    matched = [linear for node in graph.nodes if id(node) not in left and (linear := match_linear(node)) is not None]
    linears = [linear for linear in matched if _fits(linear)]
    if not linears:
        return 0
    raise_opset(graph, OPSET)
    ends = _activations(graph)
    rounded: dict[int, tuple[gs.Constant, gs.Constant]] = {}
    zeros: dict[int, gs.Constant] = {}
    biases: dict[int, gs.Constant] = {}
    for linear in linears:
        key, size = id(linear.weight), linear.out_features
        if key not in rounded:
            rounded[key] = _rounded(linear, name, per_channel)
        if linear.bias is None and size not in zeros:
            zeros[size] = constant(f"{name}/no_bias.{size}", np.zeros(size, np.float32))
        elif linear.bias is not None and id(linear.bias) not in biases:
            biases[id(linear.bias)] = _bias(linear.bias, size, name)
        bias = zeros[size] if linear.bias is None else biases[id(linear.bias)]
        activation, y = ends.get(id(linear.y)) or _end(graph, linear.y)
        _replace(graph, linear, y, name, rounded[key], bias, NUMBERS[activation])
    return len(linears)


def _fits(linear: Linear) -> bool:
    return (
        linear.quantized is None
        and not linear.transposed
        and linear.nodes[0].op == "MatMul"
        and type_of(linear.weight) in (np.float32, *HALF)
        and 0 < linear.in_features <= WIDEST
        and linear.out_features > 0
    )


def _rounded(linear: Linear, name: str, per_channel: bool) -> tuple[gs.Constant, gs.Constant]:
    """Integers [in_features, out_features] and scales [out_features] of a weight."""
    w = values(linear.weight).astype(np.float32)
    largest = np.abs(w).max(0) if per_channel else np.full(w.shape[1], np.abs(w).max(), np.float32)
    scale = np.where(largest > 0, largest / np.float32(LARGEST), np.float32(1))
    w /= scale
    integers = np.clip(np.rint(w, out=w), -LARGEST, LARGEST).astype(np.int8)
    whole = f"{name}/{linear.weight.name}"
    return constant(f"{whole}_quantized", integers), constant(f"{whole}_scale", scale)


def _bias(bias: gs.Constant, size: int, name: str) -> gs.Constant:
    """`bias` as float32 [size]."""
    if bias.dtype == np.float32 and tuple(bias.shape) == (size,):
        return bias
    return constant(f"{name}/{bias.name}/float32", values(bias).reshape(-1).astype(np.float32))


def _replace(
    graph: gs.Graph, linear: Linear, y: gs.Tensor, name: str, weight: tuple[gs.Constant, gs.Constant],
    bias: gs.Constant, activation: int,
) -> None:  # fmt: skip
    """Replace `linear` and the activation after it by an Int8Linear with the output `y`."""
    label = f"{name}/{output_name_of(linear.nodes[-1])}"
    dtype = type_of(linear.weight)
    half = dtype in HALF
    x = insert(graph, "Cast", [linear.x], f"{label}/x", attrs={"to": 1}, dtype=np.float32) if half else linear.x
    inputs = {"x": x, "weight": weight[0], "weight_scale": weight[1], "bias": bias}
    result = add_node(graph, INT8_LINEAR, inputs, label, activation=activation)
    if half:
        result = insert(graph, "Cast", [result], f"{label}/y", attrs={"to": onnx_type(dtype)}, dtype=dtype)
    y.inputs[0].outputs.clear()
    result.inputs[0].outputs = [y]


def _activations(graph: gs.Graph) -> dict[int, _End]:
    """For FFNs without a gate: id of the up projection's output → the activation, if no other node reads the output."""
    kept = {id(tensor) for tensor in graph.outputs}
    ends: dict[int, _End] = {}
    for ffn in find_anatomy(graph).ffns:
        act = ffn.activation
        if ffn.gated or act.name not in NUMBERS or len(act.inputs) != 1:
            continue
        nodes = {id(node) for node in act.nodes}
        within = [act.inputs[0], *(t for node in act.nodes for t in node.outputs if t is not act.output)]
        if all(id(t) not in kept and all(id(user) in nodes for user in t.outputs) for t in within):
            ends[id(act.inputs[0])] = (act.name, act.output)
    return ends


def _end(graph: gs.Graph, y: gs.Tensor) -> _End:
    """The activation if one single node reads `y`, as in a pooler; else "identity"."""
    if len(y.outputs) == 1 and all(y is not tensor for tensor in graph.outputs):
        node = y.outputs[0]
        approximate = str(node.attrs.get("approximate", "none")) if node.op == "Gelu" else ""
        if (node.domain or "") in ("", "ai.onnx") and (node.op, approximate) in _SINGLE:
            return _SINGLE[node.op, approximate], node.outputs[0]
    return "identity", y
