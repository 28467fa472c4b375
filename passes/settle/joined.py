"""Queries, keys and values of one product, side by side, as the attention op takes them."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from trimtab.passes.anatomy.scan import only_producer
from trimtab.passes.graph import insert, topological
from trimtab.passes.graph.weights import Joined
from trimtab.passes.settle.heads import GQA
from trimtab.plugins import DOMAIN, INT8_LINEAR

_SAME = None
_AXES: dict[tuple[str, str], tuple[int | None, ...]] = {
    ("", "Add"): (-1, -1),
    ("", "DequantizeLinear"): (1, 1, 1),
    ("", "MatMul"): (_SAME, 1),
    ("com.microsoft", "MatMulNBits"): (_SAME, 0, 0, 0, _SAME, 0),
    (DOMAIN, INT8_LINEAR.name): (_SAME, 1, 0, 0),
}
"""Op → of each input the axis of its outputs, or that it has to be the same for all."""


def join_projections(graph: gs.Graph) -> int:
    """Let one product make queries, keys and values, which GroupQueryAttention takes side by side.

    Returns:
        for how many of these ops.
    """
    joined = 0
    for node in [node for node in graph.nodes if (node.domain, node.op) == GQA]:
        if not all(tensor.name for tensor in node.inputs[:3]):
            continue
        y = _divided(node.inputs[:3]) or _side_by_side(graph, node.inputs[:3], -1, f"settle/{node.outputs[0].name}")
        if y is not None:
            node.inputs = [y, gs.Variable.empty(), gs.Variable.empty(), *node.inputs[3:]]
            joined += 1
    if joined:
        graph.cleanup(remove_unused_graph_inputs=False)
        graph.nodes = topological(graph)
    return joined


def _divided(parts: Sequence[gs.Tensor]) -> gs.Tensor | None:
    """What a Split divided into `parts`, along the last axis; None if there is none."""
    nodes = [only_producer(part) for part in parts]
    split = nodes[0]
    if split is None or split.op != "Split" or any(node is not split for node in nodes):
        return None
    last = parts[0].shape is not None and int(split.attrs.get("axis", 0)) in (-1, len(parts[0].shape) - 1)
    whole = len(split.outputs) == len(parts) and all(a is b for a, b in zip(split.outputs, parts, strict=True))
    return split.inputs[0] if last and whole else None


def _side_by_side(graph: gs.Graph, parts: Sequence[gs.Tensor], axis: int, name: str) -> gs.Tensor | None:
    """What holds all of `parts` along `axis`, by the nodes that make each of them; None if these differ."""
    if any(isinstance(part, gs.Constant) for part in parts):
        return _constants(parts, axis, name)
    nodes = [node for part in parts if (node := only_producer(part)) is not None and len(part.outputs) == 1]
    if len(nodes) < len(parts) or not _alike(nodes):
        return None
    first, inputs = nodes[0], []
    for place, group in enumerate(zip(*(node.inputs for node in nodes), strict=True)):
        along = _AXES[first.domain or "", first.op][place]
        one = all(tensor is group[0] for tensor in group) or not any(tensor.name for tensor in group)
        if along is _SAME:
            found = group[0] if one else None
        else:
            found = group[0] if not group[0].name and one else _side_by_side(graph, group, along, f"{name}/{place}")
        if found is None:
            return None
        inputs.append(found)
    attrs = dict(first.attrs)
    if "N" in attrs:
        attrs["N"] = sum(int(node.attrs["N"]) for node in nodes)
    y = insert(graph, first.op, inputs, f"{name}/{first.op}", attrs=attrs, domain=first.domain, dtype=parts[0].dtype)
    if parts[0].shape is not None and all(part.shape is not None for part in parts):
        y.shape = [*parts[0].shape[:-1], sum(part.shape[-1] for part in parts)]
    return y


def _alike(nodes: Sequence[gs.Node]) -> bool:
    """Whether outputs of `nodes` are independent of each other, and all are computed in the same way."""
    first = nodes[0]
    if (first.domain or "", first.op) not in _AXES or (first.op == "DequantizeLinear" and first.attrs.get("axis") != 0):
        return False

    def how(node: gs.Node) -> object:
        return node.op, node.domain, len(node.inputs), {key: value for key, value in node.attrs.items() if key != "N"}

    return all(how(node) == how(first) for node in nodes[1:])


def _constants(parts: Sequence[gs.Tensor], axis: int, name: str) -> gs.Constant | None:
    """Constants that differ in size along `axis` at most, side by side."""
    if not all(isinstance(part, gs.Constant) and part.shape for part in parts):
        return None
    axis %= len(parts[0].shape)
    others = [([*part.shape[:axis], *part.shape[axis + 1 :]], part.dtype) for part in parts]
    if any(other != others[0] for other in others):
        return None
    return gs.Constant(name, Joined([part._values for part in parts], axis))
