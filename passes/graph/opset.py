"""Raises the opset of a graph without loading its weights."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from trimtab.passes.errors import ModelError
from trimtab.passes.graph.edit import constant

_AXES_ARE_INPUT = {
    "ReduceSum": 13, "Squeeze": 13, "Unsqueeze": 13,
    **dict.fromkeys([
        "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
        "ReduceSumSquare",
    ], 18),
}  # fmt: skip
"""Op → the opset from which its axes are an input. Before, they are an attribute."""
_SOFT = {"Hardmax", "LogSoftmax", "Softmax"}
_ONE_AXIS = 13  # from this opset on, they apply to one axis, by default the last; before, to all from `axis` = 1 on


def raise_opset(graph: gs.Graph, opset: int) -> None:
    """Declare at least `opset` for the standard domain, in the graph and the model's functions.

    Most operators only gained types between opsets, and keep their meaning. Two kinds of nodes are rewritten, also in
    branches, loops and functions: nodes whose axes became an input, and softmax over the last axis, which became the
    default in opset 13. Functions get the same opset: ONNX Runtime 1.31 reads their nodes by the opset of the model,
    whatever the function declares. onnx.version_converter is no alternative, since it loads every weight.

    Raises:
        ModelError: a node would change its meaning; the message names it. The graph is then unchanged.
    """
    if graph.opset >= opset:
        return
    functions = [function for function in graph.functions if function.opset < opset]
    for part in (graph, *functions):
        for _, node in _nodes(part):
            reason = _change(node, part.opset, opset)
            if reason:
                inside = f" of the function {part.name}" if part is not graph else ""
                raise ModelError(
                    f"opset {part.opset} has to become {opset}, but node {node.name or node.op} ({node.op}){inside} "
                    f"{reason}",
                    hint=f"export the model with opset {opset} or newer",
                )
    for part in (graph, *functions):
        for within, node in list(_nodes(part)):
            if node.op in _SOFT and part.opset < _ONE_AXIS <= opset:
                node.attrs["axis"] = -1  # the last axis; `_change` has refused all others
            if part.opset < _AXES_ARE_INPUT.get(node.op, 0) <= opset and "axes" in node.attrs:
                node.inputs.append(_axes(within, node))
        part.opset = opset
        for entry in part.import_domains or ():  # the exporter writes these entries
            if entry.domain in ("", "ai.onnx"):
                entry.version = opset
    # The IR version of older files does not allow newer types.
    required = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    graph.ir_version = max(graph.ir_version or 0, required)


def _nodes(part: gs.Graph) -> Iterator[tuple[gs.Graph, gs.Node]]:
    """The nodes of the standard domain, each with its graph: `part` or one of its subgraphs."""
    for graph in (part, *part.subgraphs(recursive=True)):
        yield from ((graph, node) for node in graph.nodes if node.domain in (None, "", "ai.onnx"))


def _axes(graph: gs.Graph, node: gs.Node) -> gs.Tensor:
    """The axes of `node` as a tensor of `graph`; the attribute is removed."""
    axes, name = node.attrs.pop("axes"), f"{node.outputs[0].name}/axes"
    if not isinstance(axes, gs.Node.AttributeRef):
        return constant(name, np.array(axes, np.int64))
    axes_tensor = gs.Variable(name, np.int64)  # a Constant turns the function's attribute into a tensor
    place = next(i for i, each in enumerate(graph.nodes) if each is node)
    graph.nodes.insert(place, gs.Node("Constant", name, {"value_ints": axes}, outputs=[axes_tensor]))
    return axes_tensor


def _is_of_last_axis(node: gs.Node) -> bool:
    axis, shape = node.attrs.get("axis", 1), node.inputs[0].shape
    return bool(axis == -1 or (shape is not None and axis == len(shape) - 1))


def _change(node: gs.Node, old: int, new: int) -> str | None:
    """How the meaning of `node` differs between two opsets, or None.

    An op that ONNX lacks in the old opset is ONNX Runtime's own, such as LayerNormalization, which ONNX later adopted
    unchanged: the runtime accepts these in the standard domain with any opset.
    """
    before, after = (_schema(node.op, version) for version in (old, new))
    if before is None:
        return None
    if after is None or (after.deprecated and not before.deprecated):
        return "is no operator of that opset"
    if before.since_version == after.since_version:
        return None
    if node.op in _SOFT and old < _ONE_AXIS <= new and not _is_of_last_axis(node):
        return "applies to several axes together, which that opset does not allow"
    becomes_input = {"axes"} if old < _AXES_ARE_INPUT.get(node.op, 0) <= new else set()
    lost = set(node.attrs) - set(after.attributes) - becomes_input
    if lost:
        return f"has attribute {min(lost)}, which that opset does not have"
    required = [name for name, a in after.attributes.items() if a.required and name not in node.attrs]
    inputs = len(node.inputs) + len(becomes_input & set(node.attrs))
    if required or not after.min_input <= inputs <= after.max_input:
        return "takes other attributes or inputs in that opset"
    return None


def _schema(op: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return None
