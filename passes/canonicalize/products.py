"""Rewrites matrix products and biases into one form: MatMul, then Add."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.canonicalize.simplify import guarded, remove_nodes
from trimtab.passes.graph import constant, insert, output_name_of, values
from trimtab.passes.graph.linear import Linear, match_linear
from trimtab.passes.graph.shapes import entries


def lift_gemms(graph: gs.Graph) -> int:
    """Reshape to rows → Gemm → Reshape back, as MatMul + Add on the tensor itself.

    A Gemm works on rows, and a Reshape keeps their order. So the second Reshape, with its last size changed from
    out_features to in_features, can come before the product. There it often keeps the shape, and is removed.
    """
    kept = guarded(graph)
    gone = []
    for node in list(graph.nodes):
        if node.op != "Gemm" or node.domain or id(node.outputs[0]) in kept:
            continue
        linear = match_linear(node)
        before, after = node.inputs[0].inputs, node.outputs[0].outputs
        if linear is None or len(before) != 1 or before[0].op != "Reshape" or len(after) != 1:
            continue
        back = after[0]
        if back.op != "Reshape" or linear.nodes[-1] is not node:
            continue
        shape = _with_last(graph, back, linear)
        if shape is not None:
            _lift(graph, linear, before[0].inputs[0], back, shape)
            gone += [node, back]
    remove_nodes(graph, gone)
    return len(gone) // 2


def _with_last(graph: gs.Graph, back: gs.Node, linear: Linear) -> gs.Tensor | None:
    """The target shape of `back` with in_features for out_features; None if its last size is not out_features."""
    shape = back.inputs[1]
    sizes = entries(shape)
    zero_copies = not back.attrs.get("allowzero", 0)
    if sizes is None or len(sizes) < 3 or sizes[-1] != linear.out_features or (zero_copies and 0 in sizes[:-1]):
        return None
    if linear.in_features == linear.out_features:
        return shape
    name = f"canonicalize/{output_name_of(linear.nodes[-1])}/rows"
    if isinstance(shape, gs.Constant):
        return constant(name, np.array([*values(shape)[:-1], linear.in_features], np.int64))
    concat = shape.inputs[0]
    if concat.op != "Concat" or not isinstance(concat.inputs[-1], gs.Constant):
        return None
    last = constant(name + "/last", np.array([*values(concat.inputs[-1])[:-1], linear.in_features], np.int64))
    return insert(graph, "Concat", [*concat.inputs[:-1], last], name, attrs={"axis": 0}, dtype=np.int64)


def _lift(graph: gs.Graph, linear: Linear, source: gs.Tensor, back: gs.Node, shape: gs.Tensor) -> None:
    node, y = linear.nodes[-1], back.outputs[0]
    name = f"canonicalize/{output_name_of(node)}"
    leading = list(y.shape[:-1]) if y.shape is not None else None
    weight = node.inputs[1]
    if node.attrs.get("transB", 0):
        weight = insert(graph, "Transpose", [weight], name + "/weight", attrs={"perm": [1, 0]}, dtype=weight.dtype)
        weight.shape = [linear.in_features, linear.out_features]
    rows = insert(graph, "Reshape", [source, shape], name + "/x", attrs=dict(back.attrs), dtype=y.dtype)
    rows.shape = None if leading is None else [*leading, linear.in_features]
    node.outputs.clear()
    back.outputs.clear()
    if linear.bias is None:
        insert(graph, "MatMul", [rows, weight], name + "/product", outputs=[y])
        return
    product = insert(graph, "MatMul", [rows, weight], name + "/product", dtype=y.dtype)
    product.shape = y.shape
    insert(graph, "Add", [product, linear.bias], name + "/bias", outputs=[y])


def split_fused_bias(graph: gs.Graph) -> int:
    """Split com.microsoft BiasGelu(x, b) and FastGelu(x, b) into an Add and the activation."""
    count = 0
    for node in list(graph.nodes):
        fused = node.domain == "com.microsoft" and node.op in ("BiasGelu", "FastGelu")
        if fused and len(node.inputs) > 1 and node.inputs[1].name:
            x, bias = node.inputs[:2]
            summed = insert(
                graph, "Add", [x, bias], f"canonicalize/{output_name_of(node)}/bias", dtype=node.outputs[0].dtype
            )
            node.inputs = [summed]
            node.op = "Gelu" if node.op == "BiasGelu" else "FastGelu"
            count += 1
    return count
