"""Raising the opset of a graph without loading its weights."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from trimtab.passes.errors import ModelError
from trimtab.passes.graph.edit import constant

_REDUCTIONS = {
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSumSquare",
}  # fmt: skip
_AXES_ARE_INPUT = 18  # the opset from which that is so
_SOFT = {"Hardmax", "LogSoftmax", "Softmax"}
_ONE_AXIS = 13  # the opset from which these are of one axis, by default the last; before, of all from `axis` = 1 on


def raise_opset(graph: gs.Graph, opset: int) -> None:
    """Declare at least `opset` for the standard domain.

    Most operators only gained types between opsets, and mean the same under the newer number. Rewritten are reductions,
    whose axes became an input in opset 18, and softmax of the last axis, which became its default in opset 13.
    onnx.version_converter would do it too, but loads every weight.
    Functions of the model whose nodes all mean the same follow; others keep the opset that they declare.

    Raises:
        ModelError: some node would mean something else; names it. The graph is then as it was.
    """
    if graph.opset >= opset:
        return
    nodes = [node for node in graph.nodes if node.domain in (None, "", "ai.onnx")]
    for node in nodes:
        if node.op in _REDUCTIONS:
            continue
        reason = _change(node, graph.opset, opset)
        if reason:
            raise ModelError(
                f"opset {graph.opset} has to become {opset}, but node {node.name or node.op} ({node.op}) {reason}",
                hint=f"export the model with opset {opset} or newer",
            )
    for node in nodes:
        if node.op in _SOFT and graph.opset < _ONE_AXIS <= opset:
            node.attrs["axis"] = -1  # which all of them mean, or there would be a reason
        if node.op in _REDUCTIONS and graph.opset < _AXES_ARE_INPUT <= opset and "axes" in node.attrs:
            axes = np.array(node.attrs.pop("axes"), np.int64)
            node.inputs.append(constant(f"{node.outputs[0].name}/axes", axes))
    functions = [
        function
        for function in graph.functions
        if function.opset < opset and all(_is_same(node, function.opset, opset) for node in function.nodes)
    ]
    for part in (graph, *functions):
        part.opset = opset
        for entry in part.import_domains or ():  # what the exporter writes
            if entry.domain in ("", "ai.onnx"):
                entry.version = opset
    # Older files carry an IR version that newer types are not allowed in.
    least = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    graph.ir_version = max(graph.ir_version or 0, least)


def _is_same(node: gs.Node, old: int, new: int) -> bool:
    """Whether a function may hold `node` as it is under both opsets."""
    if node.domain in (None, "", "ai.onnx") and node.op in _SOFT and node.attrs.get("axis") != -1:
        return old >= _ONE_AXIS or new < _ONE_AXIS
    return node.domain not in (None, "", "ai.onnx") or _change(node, old, new) is None


def _is_of_last_axis(node: gs.Node) -> bool:
    axis, shape = int(node.attrs.get("axis", 1)), node.inputs[0].shape
    return axis == -1 or (shape is not None and axis == len(shape) - 1)


def _change(node: gs.Node, old: int, new: int) -> str | None:
    """How `node` differs in meaning between two opsets, or None."""
    try:
        before, after = (onnx.defs.get_schema(node.op, v, "") for v in (old, new))
    except onnx.defs.SchemaError:
        return "is no operator of that opset"
    if before.since_version == after.since_version:
        return None
    if node.op in _SOFT and old < _ONE_AXIS <= new and not _is_of_last_axis(node):
        return "is one of several axes together, which is not so there"
    lost = set(node.attrs) - set(after.attributes)
    if lost:
        return f"has attribute {min(lost)}, which is gone there"
    required = [name for name, a in after.attributes.items() if a.required and name not in node.attrs]
    if required or not after.min_input <= len(node.inputs) <= after.max_input:
        return "takes other attributes or inputs there"
    return None
