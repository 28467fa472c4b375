"""Splits gate and up projections that a model packs into one product: ModernBERT, Phi-3, GLM.

    x W -> Split (or two Slices) -> act(a) * b -> MatMul

reads x W[:, :f] and x W[:, f:] instead, so that a gated FFN has one form. The halves of W are views of the whole, and
`repack` joins halves that no pass has changed into one product again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import TypeAlias

import onnx_graphsurgeon as gs

from trimtab.passes.anatomy.activation import is_elementwise
from trimtab.passes.canonicalize.simplify import guarded
from trimtab.passes.graph import insert, output_name_of, replace_uses, topological, values
from trimtab.passes.graph.linear import Linear, match_linear
from trimtab.passes.graph.weights import Part

Range: TypeAlias = tuple[int, int]

_NEAR = 64  # elementwise nodes visited between a half and the down projection
_DEPTH = 16  # nodes visited for the bound of a Slice


def unpack_gates(graph: gs.Graph) -> int:
    """Split each product whose halves are gate and up of one FFN; returns the number of split products.

    Types and shapes must be known (`infer_shapes`). Quantized weights stay whole.
    """
    kept = guarded(graph)
    parts: dict[tuple[int, Range], gs.Constant] = {}
    changed = 0
    for node in topological(graph):
        linear = match_linear(node)
        if linear is None or linear.quantized is not None or linear.out_features % 2 or id(linear.y) in kept:
            continue
        halves = _halves(linear)
        if halves is None or any(id(half) in kept for half in halves.values()) or not _is_gated(linear, halves):
            continue
        for number, (at, half) in enumerate(sorted(halves.items())):
            replace_uses(graph, half, _project(graph, linear, node, at, f"{output_name_of(node)}/{number}", parts))
        changed += 1
    return changed


def _halves(linear: Linear) -> dict[Range, gs.Tensor] | None:
    """First and last half of the features of `linear` → their tensors; None if it is not divided into halves."""
    halves: dict[Range, gs.Tensor] = {}
    for node in linear.y.outputs:
        if node.op == "Shape":  # for the bounds of Slices
            continue
        pieces = _pieces(node, linear) if not node.domain else None
        if pieces is None or halves.keys() & pieces.keys():
            return None
        halves |= pieces
    size, half = linear.out_features, linear.out_features // 2
    return halves if halves.keys() == {(0, half), (half, size)} else None


def _pieces(node: gs.Node, linear: Linear) -> dict[Range, gs.Tensor] | None:
    """The ranges of features that a Split or Slice takes, with their tensors; None if it does not divide features."""
    size, shape = linear.out_features, linear.y.shape
    if shape is None:
        return None
    if node.op == "Split":
        if int(node.attrs.get("axis", 0)) not in (-1, len(shape) - 1) or len(node.outputs) != 2:
            return None
        sizes = node.attrs.get("split")
        if len(node.inputs) > 1 and node.inputs[1].name:
            sizes = _bounds(node.inputs[1], 2)
        if sizes is not None and [int(s or 0) for s in sizes] != [size // 2] * 2:
            return None
        return {(0, size // 2): node.outputs[0], (size // 2, size): node.outputs[1]}
    if node.op == "Slice" and len(node.inputs) >= 4 and len(node.inputs[3].shape or ()) == 1:
        arguments = [_bounds(tensor, 1) for tensor in node.inputs[1:5] if tensor.name]
        numbers = [bounds[0] for bounds in arguments if bounds is not None]
        if len(numbers) != len(arguments) or None in numbers:
            return None
        start, stop, axis, step = [int(n or 0) for n in [*numbers, 1]][:4]
        if axis in (-1, len(shape) - 1) and step == 1:
            return {slice(start, stop).indices(size)[:2]: node.outputs[0]}
    return None


def _bounds(tensor: gs.Tensor, count: int, depth: int = _DEPTH) -> list[int | None] | None:
    """The `count` integers in `tensor`, which exporters compute from sizes; None for unknown ones."""
    if isinstance(tensor, gs.Constant):
        readable = len(tensor.shape) < 2 and math.prod(tensor.shape) == count
        return [int(v) for v in values(tensor).reshape(-1)] if readable else None
    node = tensor.inputs[0] if len(tensor.inputs) == 1 else None
    if node is None or not depth:
        return None
    if node.op in ("Cast", "Identity", "Squeeze", "Unsqueeze"):
        return _bounds(node.inputs[0], count, depth - 1)
    if node.op == "Gather" and count == 1 and (shape := _shape_before(node.inputs[0])) is not None:
        place = _bounds(node.inputs[1], 1, depth - 1)
        if place is not None and place[0] is not None and -len(shape) <= place[0] < len(shape):
            size = shape[place[0]]
            return [size if isinstance(size, int) else None]
    if node.op in ("Add", "Div", "Mul", "Sub") and count == 1:
        a, b = (_bounds(t, 1, depth - 1) for t in node.inputs)
        if a is None or b is None or a[0] is None or b[0] is None or (node.op == "Div" and not b[0]):
            return None
        ops = {"Add": int.__add__, "Div": int.__floordiv__, "Mul": int.__mul__, "Sub": int.__sub__}
        return [ops[node.op](a[0], b[0])]
    return None


def _shape_before(tensor: gs.Tensor) -> list[int | str] | None:
    node = tensor.inputs[0] if len(tensor.inputs) == 1 else None
    whole = node is not None and node.op == "Shape" and not node.attrs.get("start") and "end" not in node.attrs
    return node.inputs[0].shape if node is not None and whole else None


def _is_gated(linear: Linear, halves: dict[Range, gs.Tensor]) -> bool:
    """True if both halves reach, through elementwise nodes only, one product with the sizes of a down projection."""
    downs = [list(_products_behind(half)) for half in halves.values()]
    products = {id(node): node for nodes in downs for node in nodes}
    if len(products) != 1 or not all(downs):
        return False
    down = match_linear(next(iter(products.values())))
    sizes = (linear.out_features // 2, linear.in_features)
    return down is not None and (down.in_features, down.out_features) == sizes


def _products_behind(tensor: gs.Tensor) -> Iterator[gs.Node]:
    """The first nodes behind `tensor` that are not elementwise."""
    seen: set[int] = set()
    queue = deque([tensor])
    while queue and len(seen) < _NEAR:
        for node in queue.popleft().outputs:
            if id(node) not in seen:
                seen.add(id(node))
                if is_elementwise(node):
                    queue.extend(node.outputs)
                else:
                    yield node


def _project(
    graph: gs.Graph, linear: Linear, product: gs.Node, at: Range, name: str, parts: dict[tuple[int, Range], gs.Constant]
) -> gs.Variable:
    """The features `at` of `linear`, computed by a product of their own."""
    name = f"canonicalize/{name}"
    leading = None if linear.y.shape is None else linear.y.shape[:-1]

    def add(node: gs.Node, inputs: list[gs.Tensor], label: str) -> gs.Variable:
        (old,) = node.outputs
        y = insert(graph, node.op, inputs, f"{name}/{label}", attrs=dict(node.attrs), dtype=old.dtype)
        y.shape = None if leading is None else [*leading, at[1] - at[0]]
        return y

    along = 0 if product.attrs.get("transB", 0) else 1
    weight = _part(graph, product.inputs[1], along, at, name, parts)
    biases = [_part(graph, t, -1, at, name, parts) if t.name else t for t in product.inputs[2:]]
    y = add(product, [product.inputs[0], weight, *biases], "product")
    if linear.nodes[-1] is not product:
        bias = next(t for t in linear.nodes[-1].inputs if isinstance(t, gs.Constant))
        y = add(linear.nodes[-1], [y, _part(graph, bias, -1, at, name, parts)], "bias")
    return y


def _part(
    graph: gs.Graph, tensor: gs.Tensor, axis: int, at: Range, name: str, parts: dict[tuple[int, Range], gs.Constant]
) -> gs.Tensor:
    """The part `at` along `axis` of a constant, perhaps behind Transpose and Cast."""
    if isinstance(tensor, gs.Constant):
        key = id(tensor), at
        if key not in parts:
            label = f"{tensor.name}/{at[0]}:{at[1]}"
            parts[key] = gs.Constant(label, Part(tensor._values, axis % len(tensor.shape), slice(*at)))
        return parts[key]
    (node,) = tensor.inputs
    before = _part(graph, node.inputs[0], 1 - axis if node.op == "Transpose" else axis, at, name, parts)
    return insert(graph, node.op, [before], f"{name}/{node.op}", attrs=dict(node.attrs), dtype=tensor.dtype)
