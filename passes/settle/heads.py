"""Removes changes of shape around attention, whose op reads and writes heads as [B, T, heads · D]."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.anatomy.scan import only_producer
from trimtab.passes.graph import constant, insert

_GQA = ("com.microsoft", "GroupQueryAttention")
_HEADS_FIRST = [0, 2, 1, 3]


def attentions(graph: gs.Graph) -> list[gs.Node]:
    """The nodes of GroupQueryAttention in `graph`."""
    return [node for node in graph.nodes if (node.domain, node.op) == _GQA]


def drop_reshapes(graph: gs.Graph) -> int:
    """Bypass Reshapes around GroupQueryAttention that only divide heads and join them again.

    Returns:
        the number of removed Reshapes.
    """
    before = _reshapes(graph)
    for node in attentions(graph):
        for place, tensor in enumerate(node.inputs[:3]):
            node.inputs[place] = _whole(tensor)
        behind = node.outputs[0]
        for reader in list(behind.outputs):
            end = _joined_behind(reader, behind) if reader.op == "Reshape" else None
            if end is not None and all(end is not output for output in graph.outputs):
                for user in list(end.outputs):
                    user.inputs = [behind if tensor is end else tensor for tensor in user.inputs]
    graph.cleanup(remove_unused_graph_inputs=False)
    return before - _reshapes(graph)


def _reshapes(graph: gs.Graph) -> int:
    return sum(node.op == "Reshape" for node in graph.nodes)


def same_rows(a: gs.Tensor, b: gs.Tensor) -> bool:
    """Whether both are [B, T, width] with the same B and T; if one is a Reshape of the other, they are then equal."""
    shapes = a.shape, b.shape
    return all(shape is not None and len(shape) == 3 for shape in shapes) and list(a.shape[:2]) == list(b.shape[:2])


def before_transpose(tensor: gs.Tensor) -> gs.Tensor | None:
    """The tensor [B, T, heads, D] of which `tensor` [B, heads, T, D] is a Transpose; None if it is not one."""
    node = only_producer(tensor)
    turned = node is not None and node.op == "Transpose" and list(node.attrs["perm"]) == _HEADS_FIRST
    return node.inputs[0] if node is not None and turned else None


def heads_joined(graph: gs.Graph, tensor: gs.Tensor, rows: gs.Tensor, name: str) -> gs.Tensor:
    """`tensor` [B, T, heads, D] as [B, T, heads · D]: the tensor before the Reshape that divided it, or a new Reshape.

    Args:
        rows: a tensor [B, T, ...] of the same tokens.
    """
    node = only_producer(tensor)
    if node is not None and node.op == "Reshape" and same_rows(node.inputs[0], rows):
        return node.inputs[0]
    y = insert(graph, "Reshape", [tensor, constant(f"{name}.shape", np.array([0, 0, -1]))], name, dtype=tensor.dtype)
    y.shape = rows.shape
    return y


def _whole(tensor: gs.Tensor) -> gs.Tensor:
    source = tensor
    while (node := only_producer(source)) is not None and node.op == "Reshape":
        source = node.inputs[0]
        if same_rows(source, tensor):
            return source
    return tensor


def _joined_behind(reader: gs.Node, start: gs.Tensor) -> gs.Tensor | None:
    """The tensor with the rows of `start` behind `reader` and further Reshapes, each the only reader of the last."""
    end = reader.outputs[0]
    while not same_rows(end, start):
        if len(end.outputs) != 1 or end.outputs[0].op != "Reshape":
            return None
        end = end.outputs[0].outputs[0]
    return end
