"""Removes nodes that change nothing."""

from __future__ import annotations

from collections.abc import Collection

import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import dtype_to_onnx

from trimtab.passes.canonicalize.shapes import same_shape
from trimtab.passes.graph import values


def guarded(graph: gs.Graph) -> set[int]:
    """Ids of tensors that must keep their names: outputs of the graph and of its subgraphs."""
    kept = {id(tensor) for tensor in graph.outputs}
    for subgraph in graph.subgraphs(recursive=True):
        kept |= {id(tensor) for tensor in subgraph.outputs}
    return kept


def remove_nodes(graph: gs.Graph, nodes: Collection[gs.Node]) -> None:
    """Remove `nodes` from the graph, all at once."""
    gone = {id(node) for node in nodes}
    for node in nodes:
        node.inputs.clear()
        node.outputs.clear()
    graph.nodes = [node for node in graph.nodes if id(node) not in gone]


def remove_copies(graph: gs.Graph) -> int:
    """Remove Identity, inference-time Dropout, Concat of one tensor, and Casts that keep the type."""
    return _remove(graph, _is_copy)


def remove_reshapes(graph: gs.Graph) -> int:
    """Remove Reshapes that keep the shape."""
    return _remove(graph, lambda node: node.op == "Reshape" and same_shape(node))


def _remove(graph: gs.Graph, is_removable: object) -> int:
    kept = guarded(graph)
    own = [node for node in graph.nodes if not node.domain]
    removed = [node for node in own if is_removable(node) and _bypass(node, kept)]  # type: ignore[operator]
    remove_nodes(graph, removed)
    return len(removed)


def _is_copy(node: gs.Node) -> bool:
    if node.op == "Identity" or (node.op == "Concat" and len(node.inputs) == 1):
        return True
    if node.op == "Dropout":
        training = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
        off = training is None or (isinstance(training, gs.Constant) and not values(training).any())
        return off and not any(mask.outputs for mask in node.outputs[1:])
    if node.op == "Cast":
        dtype = node.inputs[0].dtype
        return dtype is not None and dtype_to_onnx(dtype) == node.attrs["to"]
    return False


def _bypass(node: gs.Node, kept: set[int]) -> bool:
    """Let consumers of `node` read its input instead. False if that would drop a name that must stay."""
    source, output = node.inputs[0], node.outputs[0]
    if id(output) not in kept:
        _move_consumers(output, source)
        return True
    if not source.inputs or id(source) in kept:
        return False
    producer = source.inputs[0]
    node.outputs.clear()
    _move_consumers(source, output, but=node)
    producer.outputs = [output if tensor is source else tensor for tensor in producer.outputs]
    return True


def _move_consumers(old: gs.Tensor, new: gs.Tensor, but: gs.Node | None = None) -> None:
    for consumer in list(old.outputs):
        if consumer is not but:
            consumer.inputs = [new if tensor is old else tensor for tensor in consumer.inputs]
