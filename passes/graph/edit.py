"""Small edits that passes share, so that names and provenance of new nodes follow one form."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from trimtab.passes.graph.scratch import put_away

_SIZES_ARE_INPUTS = 13  # opset from which Split takes them as an input


def constant(name: str, array: np.ndarray | onnx.TensorProto) -> gs.Constant:
    """A new initializer, stored in the `scratch` file if one is open. Types that numpy lacks need a TensorProto."""
    if isinstance(array, onnx.TensorProto):
        array.name = name
        return put_away(gs.Constant(name, LazyValues(array)))
    return put_away(gs.Constant(name, np.asarray(array, order="C")))  # ascontiguousarray would make a scalar [1]


def insert(
    graph: gs.Graph,
    op: str,
    inputs: list[gs.Tensor],
    name: str,
    *,
    attrs: dict[str, object] | None = None,
    domain: str | None = None,
    outputs: list[gs.Variable] | None = None,
    dtype: object = None,
) -> gs.Variable:
    """Append one node and return its first output.

    Args:
        name: the node's name. It begins with the pass ("ffn-split/layer.3/heavy/up"), so profilers show its origin.
        outputs: the node's outputs; by default one new tensor called `name`.
        dtype: numpy type of the new output, if known.
    """
    outputs = outputs or [gs.Variable(name, dtype=dtype)]
    graph.nodes.append(gs.Node(op, name=name, inputs=inputs, outputs=outputs, attrs=attrs or {}, domain=domain))
    return outputs[0]


def split_last(graph: gs.Graph, y: gs.Tensor, outputs: Sequence[gs.Variable], sizes: Sequence[int], name: str) -> None:
    """Divide `y` along its last axis into `outputs`, which have no producer yet.

    Args:
        name: the node's name; the constant with the sizes is "<name>.sizes".
    """
    inputs: list[gs.Tensor] = [y]
    attrs: dict[str, object] = {"axis": -1}
    if graph.opset < _SIZES_ARE_INPUTS:
        attrs["split"] = list(sizes)
    else:
        inputs.append(constant(f"{name}.sizes", np.array(sizes, np.int64)))
    insert(graph, "Split", inputs, name, attrs=attrs, outputs=list(outputs))


def replace_uses(graph: gs.Graph, old: gs.Tensor, new: gs.Tensor) -> None:
    """Make every consumer of `old`, and the graph's outputs, use `new`. Subgraphs are not searched."""
    for node in list(old.outputs):
        node.inputs = [new if tensor is old else tensor for tensor in node.inputs]
    if any(tensor is old for tensor in graph.outputs):
        rename_output(graph, old, new)


def rename_output(graph: gs.Graph, old: gs.Tensor, new: gs.Tensor) -> None:
    """Replace the graph output `old` by `new`, under the old name, so that callers see no change."""
    graph.outputs = [new if tensor is old else tensor for tensor in graph.outputs]
    taken, old_name = graph.tensors(), old.name
    while old.name in taken:  # several passes may have renamed outputs that had this name
        old.name += "/before"
    new.name, new.dtype, new.shape = old_name, old.dtype, old.shape


def output_name_of(node: gs.Node) -> str:
    """The node's name in messages: its name, or its first output if it has none."""
    return node.name or (node.outputs[0].name if node.outputs else node.op)
