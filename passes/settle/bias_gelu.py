"""Fuses a bias with the GELU behind it, for ONNX Runtime with packed tokens."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from trimtab.plugins import PACKED_ATTENTION

_MICROSOFT = "com.microsoft"
_FUSED = {"none": "BiasGelu", "tanh": "FastGelu"}
"""`approximate` of ONNX's Gelu → the op that also adds a bias."""


def fuse_bias_gelu(graph: gs.Graph) -> int:
    """Fuse a product's bias and GELU into one op of ONNX Runtime, in place, where tokens are packed.

    With three axes, ONNX Runtime 1.31 fuses them itself. With two, it fuses MatMul and Add into a Gemm that writes the
    bias into every row of its output before it adds the product. For 1536 tokens it writes 9 MB more in each layer of
    MiniLM, and packed encoders take 3 to 8 % longer.

    Returns:
        the number of fusions.
    """
    if all(node.op != PACKED_ATTENTION.name for node in graph.nodes):
        return 0
    fused, outputs = 0, {id(tensor) for tensor in graph.outputs}
    for node in graph.nodes:
        if node.op != "Gelu" or node.domain or node.inputs[0].dtype != np.float32:
            continue
        parts = _product_and_bias(node.inputs[0])
        if parts is None or id(node.inputs[0]) in outputs:
            continue
        node.op, node.domain, node.inputs = _FUSED[node.attrs.pop("approximate", "none")], _MICROSOFT, list(parts)
        fused += 1
    if fused:
        domains = graph.import_domains or [onnx.helper.make_opsetid("", graph.opset)]
        if all(domain.domain != _MICROSOFT for domain in domains):
            graph.import_domains = [*domains, onnx.helper.make_opsetid(_MICROSOFT, 1)]
        graph.cleanup(remove_unused_graph_inputs=False)
    return fused


def _product_and_bias(tensor: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor] | None:
    """A product with a weight, and the constant added to each of its rows; None if `tensor` is not their sum."""
    if len(tensor.inputs) != 1 or tensor.inputs[0].op != "Add" or len(tensor.outputs) != 1:
        return None
    for x, bias in (tensor.inputs[0].inputs, tensor.inputs[0].inputs[::-1]):
        weight = x.inputs[0].inputs[1] if len(x.inputs) == 1 and x.inputs[0].op == "MatMul" else None
        if isinstance(weight, gs.Constant) and isinstance(bias, gs.Constant) and [*bias.shape] == [*weight.shape[1:]]:
            return x, bias
    return None
