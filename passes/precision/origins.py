"""Finds floats that are counted, not learned: positions, distances, numbers of tokens, and values computed from them.

    ids -> Shape -> Range -> Cast -> Div -> Log -> Mul -> Cast -> Gather     relative position buckets
    positions -> Cast -> MatMul (frequencies) -> Cos                         rotary angles
    distances -> Cast -> Mul (slopes)                                        ALiBi

float16 has no odd integers above 2048, and bfloat16 none above 256. A bucket, an angle or a bias that is computed from
a rounded position belongs to another position.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from trimtab.passes.graph import topological
from trimtab.passes.precision.tensors import has_subgraphs, has_weights, is_float, is_integer
from trimtab.plugins import DOMAIN

_ROUNDERS = frozenset(["ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul", "QuantizeLinear"])
"""Ops whose integer outputs are rounded activations, or sums of products of these."""


def counted_nodes(graph: gs.Graph) -> set[int]:
    """Ids of the nodes all of whose floats come from integers and small constants.

    The search stops at layers with weights, such as an embedding or a product that reads sinusoids, and at nodes that
    read other floats, too.
    """
    nodes: set[int] = set()
    tensors: set[int] = set()
    rounded: set[int] = set()
    for node in topological(graph):
        outputs = {id(tensor) for tensor in node.outputs}
        if has_subgraphs(node) or node.domain == DOMAIN:
            continue
        if node.op in _ROUNDERS or (node.op != "Shape" and any(id(t) in rounded for t in node.inputs)):
            rounded |= outputs
            continue
        floats = [t for t in node.inputs if is_float(t) and not isinstance(t, gs.Constant)]
        if has_weights(node) or any(id(t) not in tensors for t in floats):
            continue
        if floats or _converts(node):
            nodes.add(id(node))
            tensors |= {id(t) for t in node.outputs if is_float(t)}
    return nodes


def _converts(node: gs.Node) -> bool:
    """Whether `node` converts integers to floats."""
    if node.op not in ("Cast", "CastLike") or not is_float(node.outputs[0]):
        return False
    return is_integer(node.inputs[0]) and not isinstance(node.inputs[0], gs.Constant)
