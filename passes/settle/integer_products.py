"""Keeps integer products with a bias from fusion in ONNX Runtime: findings/qdq_matmul_add_rank_2.sh."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from trimtab.plugins import PACKED_ATTENTION


def keep_integer_products(graph: gs.Graph) -> int:
    """Replace Add by Sum behind products of two DequantizeLinear, in place, where tokens are packed.

    With two axes, ONNX Runtime 1.31 fuses MatMul and Add into a Gemm, which dequantizes the weight in each run and
    multiplies in float. It does not fuse Sum.

    Returns:
        the number of replaced nodes.
    """
    if all(node.op != PACKED_ATTENTION.name for node in graph.nodes):
        return 0
    changed = 0
    for node in graph.nodes:
        if node.op == "Add" and any(_multiplies_integers(tensor) for tensor in node.inputs):
            node.op, changed = "Sum", changed + 1
    return changed


def _multiplies_integers(tensor: gs.Tensor) -> bool:
    """Whether `tensor` is a product of two outputs of DequantizeLinear."""
    if len(tensor.inputs) != 1 or tensor.inputs[0].op != "MatMul":
        return False
    factors = tensor.inputs[0].inputs
    return all(len(x.inputs) == 1 and x.inputs[0].op == "DequantizeLinear" for x in factors)
