"""Checks the model-local functions of an ONNX file: none calls itself, and inlining them does not exceed a limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from onnx import FunctionProto, ModelProto, NodeProto

from trimtab.passes.graph.wellformed.fault import MalformedError, name_of
from trimtab.passes.graph.wellformed.nodes import subgraphs

_Key = tuple[str, str, str]


def inlined_nodes(model: ModelProto, limit: int) -> int:
    """The number of nodes of the graph with every function call inlined, as runtimes do.

    Args:
        limit: the maximum number of nodes.

    Raises:
        MalformedError: a function is defined twice or calls itself, or there are too many nodes.
    """
    functions: dict[_Key, FunctionProto] = {}
    for function in model.functions:
        key = (function.domain, function.name, function.overload)
        if key in functions:
            raise MalformedError(f"the function {_label(key)} is defined twice")
        functions[key] = function
    sizes: dict[_Key, int] = {}
    for key in _callees_first(functions):
        sizes[key] = _size(functions[key].node, sizes)
        if sizes[key] > limit:
            raise MalformedError(f"the function {_label(key)} has more than {limit} nodes when its calls are inlined")
    total = _size(model.graph.node, sizes)
    if total > limit:
        raise MalformedError(f"it has more than {limit} nodes when its functions are inlined")
    return total


def _callees_first(functions: dict[_Key, FunctionProto]) -> list[_Key]:
    """All functions, each after the functions that it calls."""
    calls = {key: [c for c in map(_call, _all_nodes(f.node)) if c in functions] for key, f in functions.items()}
    ordered: list[_Key] = []
    state: dict[_Key, bool] = {}  # False: being visited; True: done
    for root in functions:
        stack = [] if root in state else [(root, iter(calls[root]))]
        state.setdefault(root, False)
        while stack:
            key, pending = stack[-1]
            callee = next(pending, None)
            if callee is None:
                stack.pop()
                state[key] = True
                ordered.append(key)
            elif callee not in state:
                state[callee] = False
                stack.append((callee, iter(calls[callee])))
            elif not state[callee]:
                raise MalformedError(f"the function {_label(callee)} calls itself")
    return ordered


def _size(nodes: Sequence[NodeProto], sizes: dict[_Key, int]) -> int:
    return sum(sizes.get(_call(node), 1) for node in _all_nodes(nodes))


def _all_nodes(nodes: Sequence[NodeProto]) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from _all_nodes(graph.node)


def _call(node: NodeProto) -> _Key:
    return (node.domain, node.op_type, node.overload)


def _label(key: _Key) -> str:
    return name_of("::".join(filter(None, key)))
