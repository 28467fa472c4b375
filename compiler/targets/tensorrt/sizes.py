"""Shapes of all tensors of a graph whose inputs have known ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.canonicalize.fold import fold_constants
from trimtab.passes.canonicalize.shapes import infer_shapes
from trimtab.passes.graph import constant, topological, values
from trimtab.plugins.tensorrt.names import PLUGINS

_ROUNDS = 256  # each layer of plugins takes one and more


def sizes_at(graph: gs.Graph, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Tensor → shape, of those that can be told, where the inputs have `shapes`. `graph` stays as it is.

    Shape inference sees no further than a size that is computed; so sizes that it has found become constants, what is
    computed of them is folded, and it goes on from there.
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
        found = sum(_told(node, kept) for node in topological(part)) + sum(_tell(node) for node in plugins)
        with np.errstate(all="ignore"):  # of branches that are computed and not taken
            folded = fold_constants(part)
        if not found + folded:
            break
    return {
        name: tuple(tensor.shape)
        for name, tensor in part.tensors().items()
        if tensor.shape is not None and all(isinstance(size, int) for size in tensor.shape)
    }


def _let_infer_outputs(graph: gs.Graph) -> None:
    """Put an Identity behind each output, since inference leaves outputs the sizes that they are declared with."""
    ends = []
    for number, tensor in enumerate(graph.outputs):
        ends.append(gs.Variable(f"{tensor.name}/end.{number}", tensor.dtype))
        graph.nodes.append(gs.Node("Identity", inputs=[tensor], outputs=[ends[-1]]))
    graph.outputs = ends


def _tell(node: gs.Node) -> bool:
    """Give the outputs of a plugin their shapes, by its op's own rules; whether any is news."""
    plugin = PLUGINS[node.op]
    shapes = {
        name: None if t.shape is None else list(t.shape) for name, t in zip(plugin.inputs, node.inputs, strict=True)
    }
    inferred = plugin.op.shapes(shapes, plugin.decode(node.attrs))
    news = False
    for output, name in zip(node.outputs, plugin.outputs, strict=True):
        shape = inferred[name]
        if shape is not None and all(isinstance(size, int) for size in shape) and shape != output.shape:
            output.shape, news = shape, True
    return news


def _told(node: gs.Node, kept: set[int]) -> bool:
    """Let the answer of a Shape or a Range that is known stand in its place."""
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
    made = constant(f"{output.name}/known", answer)
    for reader in list(output.outputs):
        reader.inputs = [made if tensor is output else tensor for tensor in reader.inputs]
    return True
