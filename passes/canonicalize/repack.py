"""Joins two products with the halves of one weight, which `unpack_gates` has split, into one product again."""

from __future__ import annotations

from collections.abc import Hashable

import onnx_graphsurgeon as gs

from trimtab.passes.graph import insert, split_last, topological
from trimtab.passes.graph.linear import Linear, match_linear
from trimtab.passes.graph.weights import Part


def repack(graph: gs.Graph) -> int:
    """Join products whose weights and biases are still the two halves of one; returns the number of pairs.

    So a model that no pass has changed keeps its weight, a tensor of its own file: runtimes can map that, and no copy
    is written. Two products are no slower (ONNX Runtime 1.31, fp32 and int8, 48 and 384 tokens).
    """
    wholes = {id(t._values): t for t in graph.tensors().values() if isinstance(t, gs.Constant)}
    firsts: dict[Hashable, Linear] = {}
    joined = 0
    for node in topological(graph):
        linear = match_linear(node)
        part = linear.weight._values if linear is not None else None
        if linear is None or not isinstance(part, Part):
            continue
        key = id(linear.x), id(part.whole)
        other = firsts.pop(key, None)
        if other is None:
            firsts[key] = linear
        else:
            first, last = sorted((linear, other), key=_start)
            joined += _join(graph, first, last, wholes)
    if joined:
        graph.cleanup(remove_unused_graph_inputs=False)
        graph.nodes = topological(graph)
    return joined


def _start(linear: Linear) -> int:
    part: Part = linear.weight._values
    return int(part.index.start)


def _join(graph: gs.Graph, a: Linear, b: Linear, wholes: dict[int, gs.Constant]) -> bool:
    """Let one product make the outputs of `a` and `b`, as first and second half; False if they are not such a pair."""
    (product, *adds), (other, *more) = (_nodes(linear) for linear in (a, b))
    name = f"canonicalize/{product.outputs[0].name}/packed"
    pairs = list(zip(product.inputs[1:], other.inputs[1:], strict=False))
    pairs += [(_constant(one), _constant(another)) for one, another in zip(adds, more, strict=False)]
    joined = [_whole(graph, one, another, name, wholes) for one, another in pairs]
    constants = [tensor for tensor in joined if tensor is not None]
    alike = (product.op, product.attrs, len(adds)) == (other.op, other.attrs, len(more))
    if not alike or len(product.inputs) != len(other.inputs) or len(constants) != len(joined):
        return False
    y: gs.Variable | None = None
    for node, count in [(product, len(product.inputs) - 1), *((add, 1) for add in adds)]:
        inputs = [a.x if y is None else y, *constants[:count]]
        del constants[:count]
        y = insert(graph, node.op, inputs, f"{name}/{node.op}", attrs=dict(node.attrs), dtype=a.y.dtype)
        y.shape = None if a.y.shape is None else [*a.y.shape[:-1], a.out_features + b.out_features]
    assert y is not None
    for linear in (a, b):
        linear.nodes[-1].outputs.clear()
    split_last(graph, y, [a.y, b.y], [a.out_features, b.out_features], f"{name}/Split")
    return True


def _nodes(linear: Linear) -> list[gs.Node]:
    """The product, and the Add of its bias."""
    return [node for node in linear.nodes if node.op not in ("Cast", "Transpose")]


def _constant(add: gs.Node) -> gs.Tensor:
    return next(tensor for tensor in add.inputs if isinstance(tensor, gs.Constant))


def _whole(
    graph: gs.Graph, first: gs.Tensor, last: gs.Tensor, name: str, wholes: dict[int, gs.Constant]
) -> gs.Tensor | None:
    """The tensor whose halves are two constants, perhaps behind Transpose and Cast; None if there is none."""
    if isinstance(first, gs.Constant) and isinstance(last, gs.Constant):
        a, b = first._values, last._values
        if not (isinstance(a, Part) and isinstance(b, Part) and a.whole is b.whole and a.axis == b.axis):
            return None
        size = int(a.whole.shape[a.axis])
        if (a.index, b.index) != (slice(0, size // 2), slice(size // 2, size)):
            return None
        return wholes.setdefault(id(a.whole), gs.Constant(first.name.rpartition("/")[0], a.whole))
    if len(first.inputs) != 1 or len(last.inputs) != 1:
        return None
    (one,), (another,) = first.inputs, last.inputs
    before = _whole(graph, one.inputs[0], another.inputs[0], name, wholes)
    if before is None or (one.op, one.attrs) != (another.op, another.attrs):
        return None
    return insert(graph, one.op, [before], f"{name}/{one.op}", attrs=dict(one.attrs), dtype=first.dtype)
