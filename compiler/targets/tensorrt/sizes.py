"""Infers the shapes of all tensors of a graph from the shapes of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.canonicalize.fold import fold_constants
from trimtab.passes.canonicalize.shapes import infer_shapes
from trimtab.passes.graph import constant, topological, values
from trimtab.plugins.tensorrt.names import PLUGINS

_ROUNDS = 256  # each layer of plugins takes at least one round


def sizes_at(graph: gs.Graph, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Tensor → shape, where it can be inferred from the inputs' `shapes`. `graph` is not changed.

    Shape inference stops at a size that the graph computes. So inferred sizes become constants, arithmetic on them is
    folded, and inference runs again.
    """
    part = graph.copy()
    for tensor in part.inputs:
        tensor.shape = list(shapes[tensor.name])
    _let_infer_outputs(part)
    plugins = [node for node in part.nodes if node.op in PLUGINS]
    for node in plugins:
        for output in node.outputs:
            output.shape = None
    kept = {id(tensor) for tensor in part.outputs}
    for _ in range(_ROUNDS):
        infer_shapes(part)
        changes = sum(_fold_size(node, kept) for node in topological(part)) + sum(_set_shapes(node) for node in plugins)
        with np.errstate(all="ignore"):  # warnings come from branches that are folded and never run
            folded = fold_constants(part)
        if not changes + folded:
            break
    return {
        name: tuple(tensor.shape)
        for name, tensor in part.tensors().items()
        if tensor.shape is not None and all(isinstance(size, int) for size in tensor.shape)
    }


def _let_infer_outputs(graph: gs.Graph) -> None:
    """Add an Identity behind each output, since inference keeps the declared sizes of outputs."""
    ends = []
    for number, tensor in enumerate(graph.outputs):
        ends.append(gs.Variable(f"{tensor.name}/end.{number}", tensor.dtype))
        graph.nodes.append(gs.Node("Identity", inputs=[tensor], outputs=[ends[-1]]))
    graph.outputs = ends


def _set_shapes(node: gs.Node) -> bool:
    """Set the shapes of a plugin's outputs by the shape function of its op; returns whether any shape changed."""
    plugin = PLUGINS[node.op]
    shapes = {
        name: None if t.shape is None else list(t.shape) for name, t in zip(plugin.inputs, node.inputs, strict=True)
    }
    inferred = plugin.op.shapes(shapes, plugin.decode(node.attrs))
    changed = False
    for output, name in zip(node.outputs, plugin.outputs, strict=True):
        shape = inferred[name]
        if shape is not None and all(isinstance(size, int) for size in shape) and shape != output.shape:
            output.shape, changed = shape, True
    return changed


def _fold_size(node: gs.Node, kept: set[int]) -> bool:
    """Replace a Shape or Range with known inputs by a constant; returns whether it did."""
    if len(node.outputs) != 1 or id(node.outputs[0]) in kept or not node.outputs[0].outputs:
        return False
    output = node.outputs[0]
    if node.op == "Shape":
        shape = node.inputs[0].shape
        if shape is None or not all(isinstance(size, int) for size in shape):
            return False
        answer = np.array(list(shape)[int(node.attrs.get("start", 0)) : node.attrs.get("end")], np.int64)
    elif node.op == "Range" and all(isinstance(t, gs.Constant) for t in node.inputs):
        start, limit, delta = (values(t).item() for t in node.inputs)
        answer = np.arange(start, limit, delta, dtype=values(node.inputs[0]).dtype)
    else:
        return False
    replacement = constant(f"{output.name}/known", answer)
    for reader in list(output.outputs):
        reader.inputs = [replacement if tensor is output else tensor for tensor in reader.inputs]
    return True
