"""Products of integers with what is added to them, as ONNX Runtime keeps them: findings/qdq_matmul_add_rank_2.sh."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from trimtab.plugins import PACKED_ATTENTION


def keep_integer_products(graph: gs.Graph) -> int:
    """Let Sum add to products whose factors come of DequantizeLinear, in place, where tokens are packed.

    With two axes ONNX Runtime 1.31 makes a Gemm of MatMul and Add, which dequantizes the weight in each run and
    multiplies in float. It does not look for Sum.

    Returns:
        how many.
    """
    if all(node.op != PACKED_ATTENTION.name for node in graph.nodes):
        return 0
    changed = 0
    for node in graph.nodes:
        if node.op == "Add" and any(_multiplies_integers(tensor) for tensor in node.inputs):
            node.op, changed = "Sum", changed + 1
    return changed


def _multiplies_integers(tensor: gs.Tensor) -> bool:
    """Whether `tensor` is a product of two factors that DequantizeLinear gives."""
    if len(tensor.inputs) != 1 or tensor.inputs[0].op != "MatMul":
        return False
    factors = tensor.inputs[0].inputs
    return all(len(x.inputs) == 1 and x.inputs[0].op == "DequantizeLinear" for x in factors)
