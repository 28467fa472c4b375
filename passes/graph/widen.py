"""Computes nodes in half precision in float32, for tools that support no other type."""

from __future__ import annotations

from collections.abc import Collection

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.graph.edit import constant, insert
from trimtab.passes.graph.order import topological
from trimtab.passes.graph.weights import values
from trimtab.plugins.lowering import onnx_type, type_of

HALF = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
_FLOAT = np.dtype(np.float32)


def widen(graph: gs.Graph, nodes: Collection[gs.Node], name: str) -> int:
    """Compute the `nodes` with weights in half precision in float32; their readers still get half precision.

    Weights become float32 constants, one for all their readers; other inputs and the outputs get a Cast. The types of
    the graph's tensors must be known (`infer_shapes`).

    Args:
        name: the name of the pass, with which the names of new tensors begin.

    Returns:
        the number of changed nodes.
    """
    wides: dict[int, gs.Tensor] = {}

    def wide(tensor: gs.Tensor) -> gs.Tensor:
        if not tensor.name or type_of(tensor) not in HALF:
            return tensor
        if id(tensor) not in wides:
            label = f"{name}/{tensor.name}/float32"
            if isinstance(tensor, gs.Constant):
                wides[id(tensor)] = constant(label, values(tensor).astype(np.float32))
            else:
                wides[id(tensor)] = insert(
                    graph, "Cast", [tensor], label, attrs={"to": onnx_type(_FLOAT)}, dtype=_FLOAT
                )
        return wides[id(tensor)]

    half = [n for n in nodes if any(isinstance(t, gs.Constant) and type_of(t) in HALF for t in n.inputs)]
    for node in half:
        types = [type_of(tensor) if tensor.name else None for tensor in node.outputs]
        node.inputs = [wide(tensor) for tensor in node.inputs]
        for place, dtype in enumerate(types):
            if dtype in HALF:
                old = node.outputs[place]
                node.outputs[place] = gs.Variable(f"{name}/{old.name}/wide", _FLOAT, old.shape)
                attrs: dict[str, object] = {"to": onnx_type(dtype)}
                insert(graph, "Cast", [node.outputs[place]], f"{name}/{old.name}", attrs=attrs, outputs=[old])
    graph.nodes = topological(graph)
    return len(half)
