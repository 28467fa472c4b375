"""All checks of an ONNX file, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from onnx import GraphProto, ModelProto, NodeProto, OperatorSetIdProto

from trimtab.passes.graph.wellformed.fault import MalformedError, name_of, refused
from trimtab.passes.graph.wellformed.functions import inlined_nodes
from trimtab.passes.graph.wellformed.nodes import check_node, subgraphs, tensors
from trimtab.passes.graph.wellformed.scopes import check_scope, given_names, names
from trimtab.passes.graph.wellformed.tensors import check_tensor, check_type
from trimtab.passes.graph.wellformed.text import check_text

MAX_NODES = 500_000
"""Maximum number of nodes with functions inlined. The largest exports have some ten thousand."""

MAX_NESTING = 16
"""Maximum nesting of graphs. Exports with If and Loop have two or three levels."""


def check_model(model: ModelProto, where: str) -> None:
    """Refuse a file that is not a well-formed ONNX model, so that later code need not check it.

    External data are checked later, when they are attached to the graph. Attributes and inputs of ops that onnx does
    not define, such as those of ONNX Runtime, are not checked.

    Args:
        where: the file, for messages.

    Raises:
        ModelError: the file is not well-formed; the message names the node or tensor and its fault.
    """
    try:
        check_text(model)
        opsets = _opsets(model.opset_import)
        _check_nesting(model.graph, 1)
        for function in model.functions:
            for graph in (graph for node in function.node for graph in subgraphs(node)):
                _check_nesting(graph, 2)
        inlined_nodes(model, MAX_NODES)
        _check_graph(model.graph, opsets, frozenset())
        for each in (*model.graph.input, *model.graph.output):
            check_type(each.type, f"input or output {name_of(each.name)}")
        for function in model.functions:
            inside = _opsets(function.opset_import)
            check_scope(function.node, function.input, function.output)
            visible = frozenset(function.input) | {name for node in function.node for name in node.output}
            _check_nodes(function.node, opsets | inside, visible, in_function=True)
    except MalformedError as fault:
        raise refused(where, fault) from fault


def _check_graph(
    graph: GraphProto, opsets: Mapping[str, int], outer: frozenset[str], in_function: bool = False
) -> None:
    inputs = [each.name for each in graph.input]
    weights = [each.name for each in graph.initializer]
    for what, each in (("input", inputs), ("initializer", weights), ("output", [o.name for o in graph.output])):
        if "" in each:
            raise MalformedError(f"the graph has an {what} without a name")
        if len(set(each)) < len(each):
            twice = next(name for place, name in enumerate(each) if name in each[:place])
            raise MalformedError(f"the {what} {name_of(twice)} is given twice")
    for tensor in graph.initializer:
        check_tensor(tensor)
    check_scope(graph.node, given_names(graph), (each.name for each in graph.output), outer)
    _check_nodes(graph.node, opsets, outer | names(graph), in_function=in_function)


def _check_nodes(
    nodes: Sequence[NodeProto], opsets: Mapping[str, int], visible: frozenset[str], *, in_function: bool
) -> None:
    for node in nodes:
        if not node.domain and "" not in opsets:
            raise MalformedError("it imports no opset of ONNX's own ops, but has nodes with such ops")
        check_node(node, opsets, in_function=in_function)
        for tensor in tensors(node):
            check_tensor(tensor)
        for graph in subgraphs(node):
            _check_graph(graph, opsets, visible, in_function)


def _check_nesting(graph: GraphProto, depth: int) -> None:
    if depth > MAX_NESTING:
        raise MalformedError(f"graphs are nested more than {MAX_NESTING} deep")
    for node in graph.node:
        for inner in subgraphs(node):
            _check_nesting(inner, depth + 1)


def _opsets(imports: Sequence[OperatorSetIdProto]) -> dict[str, int]:
    """Domain → version."""
    opsets: dict[str, int] = {}
    for each in imports:
        if opsets.setdefault(each.domain, each.version) != each.version:
            raise MalformedError(f"the opset of domain {name_of(each.domain)} is given twice")
        if each.version < 1:
            raise MalformedError(f"the opset of domain {name_of(each.domain)} is {each.version}")
    newest = onnx.defs.onnx_opset_version()
    if opsets.get("", 0) > newest:
        raise MalformedError(
            f"its opset {opsets['']} is newer than {newest}, the last that onnx {onnx.__version__} supports"
        )
    return opsets
