"""Brings products with weights into the form that quantizers support: MatMul of a computed tensor and a constant."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from trimtab.passes.graph.edit import constant, insert, output_name_of
from trimtab.passes.graph.order import topological
from trimtab.passes.graph.weights import values

_PRODUCTS = frozenset([("", op) for op in ("Attention", "Einsum", "Gemm", "MatMul")]) | {
    ("com.microsoft", op)
    for op in ("Attention", "FusedMatMul", "GroupQueryAttention", "MatMulNBits", "MultiHeadAttention")
}
_Steps = tuple[tuple[str, tuple[int, ...] | int | None], ...]
"""Transposes with their axes, and Casts with their type."""

_FOLDED = frozenset(["Cast", "Identity", "Transpose"])


def expose_weights(graph: gs.Graph, name: str) -> None:
    """Fold the nodes between a constant and a MatMul or Gemm, so that every weight is a constant operand.

    Transposes and Casts of a constant, and `transB` of a Gemm, are folded once for all products that use them. A Gemm
    that only multiplies and adds becomes MatMul and Add.

    Args:
        name: the name of the pass, with which the names of new tensors begin.
    """
    folded: dict[Hashable, gs.Constant] = {}
    for node in list(graph.nodes):
        if node.domain or node.op not in ("MatMul", "Gemm") or isinstance(node.inputs[0], gs.Constant):
            continue
        if node.op == "Gemm" and _scales(node):
            continue
        weight, steps = _origin(node.inputs[1])
        if weight is None:
            continue
        if node.op == "Gemm" and node.attrs.get("transB", 0):
            steps = (*steps, ("Transpose", (1, 0)))
        steps = _brief(steps, len(weight.shape))
        key = (id(weight), steps)
        if steps and key not in folded:
            folded[key] = constant(f"{name}/{weight.name}.{len(folded)}", _evaluate(weight, steps))
        node.inputs[1] = folded[key] if steps else weight
        if node.op == "Gemm":
            _as_matmul(graph, node, name)


def float_products(graph: gs.Graph) -> Iterator[tuple[str, str | None]]:
    """(name of its output, why) for each product of `graph` that a quantizer of weights leaves in floating point.

    Products of two DequantizeLinear outputs are skipped: runtimes compute them in integers. `why` is None where both
    operands depend on the graph's inputs, as in attention: the product has no weights.
    """
    fixed = _fixed(graph)
    for node in graph.nodes:
        if (node.domain or "", node.op) in _PRODUCTS and not all(
            _behind(t, "DequantizeLinear") for t in node.inputs[:2]
        ):
            yield node.outputs[0].name, _why_float(node, fixed)


def _fixed(graph: gs.Graph) -> set[int]:
    """Ids of the tensors that are computed from constants only."""
    fixed: set[int] = set()
    for node in topological(graph):
        node_inputs = [tensor for tensor in node.inputs if tensor.name]
        if node_inputs and all(isinstance(tensor, gs.Constant) or id(tensor) in fixed for tensor in node_inputs):
            fixed.update(id(tensor) for tensor in node.outputs)
    return fixed


def _why_float(node: gs.Node, fixed: set[int]) -> str | None:
    first, second = node.inputs[:2]
    if node.op == "MatMulNBits" or _behind(second, "DequantizeLinear"):
        return "its weights are already integers in blocks"
    if isinstance(first, gs.Constant):
        return "its weights are the left operand; the quantizer takes those on the right"
    if not isinstance(second, gs.Constant):
        return "its weights are computed" if fixed.intersection((id(first), id(second))) else None
    if node.op == "Gemm":
        return "a Gemm with alpha, beta or transA"
    if second.dtype not in (np.float32, np.float16):
        kind = (
            onnx.TensorProto.DataType.Name(second.dtype)
            if isinstance(second.dtype, int)
            else np.dtype(second.dtype).name
        )
        return f"its weights are {kind.lower()}; the quantizer takes float32 and half precision"
    return f"ONNX Runtime's quantizer does not take this {node.op}"


def _scales(gemm: gs.Node) -> bool:
    """True for a Gemm that computes more than x W + b."""
    attrs, has_bias = gemm.attrs, len(gemm.inputs) > 2 and gemm.inputs[2].name
    return (
        attrs.get("alpha", 1.0) != 1.0
        or bool(attrs.get("transA", 0))
        or bool(has_bias and attrs.get("beta", 1.0) != 1.0)
    )


def _origin(tensor: gs.Tensor) -> tuple[gs.Constant | None, _Steps]:
    """The constant from which `tensor` is computed, and the steps between; None if there is no such constant."""
    steps: list[tuple[str, tuple[int, ...] | int | None]] = []
    while not isinstance(tensor, gs.Constant):
        node = tensor.inputs[0] if len(tensor.inputs) == 1 else None
        if node is None or node.domain or node.op not in _FOLDED:
            return None, ()
        if node.op == "Transpose":
            steps.append(("Transpose", tuple(node.attrs["perm"]) if "perm" in node.attrs else None))
        elif node.op == "Cast":
            steps.append(("Cast", int(node.attrs["to"])))
        tensor = node.inputs[0]
    return tensor, tuple(reversed(steps))


def _brief(steps: _Steps, rank: int) -> _Steps:
    """`steps` with their Transposes merged into one at the end, so that equal steps compare equal."""
    axes = tuple(range(rank))
    for op, argument in steps:
        if op == "Transpose":
            perm = argument if isinstance(argument, tuple) else tuple(reversed(range(rank)))
            axes = tuple(axes[axis] for axis in perm)
    casts = tuple(step for step in steps if step[0] == "Cast")
    return casts if axes == tuple(range(rank)) else (*casts, ("Transpose", axes))


def _evaluate(weight: gs.Constant, steps: _Steps) -> np.ndarray:
    array = values(weight)
    for _, argument in steps:
        if isinstance(argument, int):
            array = array.astype(onnx.helper.tensor_dtype_to_np_dtype(argument))
        else:
            array = np.transpose(array, argument)
    return np.ascontiguousarray(array)


def _as_matmul(graph: gs.Graph, gemm: gs.Node, name: str) -> None:
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 and gemm.inputs[2].name else None
    gemm.op, gemm.attrs, gemm.inputs = "MatMul", {}, gemm.inputs[:2]
    if bias is not None:
        y = gemm.outputs[0]
        product = gs.Variable(f"{name}/{output_name_of(gemm)}/product", dtype=y.dtype, shape=y.shape)
        gemm.outputs = [product]
        insert(graph, "Add", [product, bias], f"{name}/{output_name_of(gemm)}/bias", outputs=[y])


def _behind(tensor: gs.Tensor, op: str) -> bool:
    """True if `tensor` comes from a node of `op`, directly or through Transpose and Cast."""
    while not isinstance(tensor, gs.Constant) and len(tensor.inputs) == 1:
        node = tensor.inputs[0]
        if node.op == op:
            return True
        if node.op not in _FOLDED:
            return False
        tensor = node.inputs[0]
    return False
