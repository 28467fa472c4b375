"""Fuses each LayerNorm that an exporter wrote out into one LayerNormalization.

    x -> ReduceMean -> Sub -> Pow 2 -> ReduceMean -> Add -> Sqrt -> Div [-> Mul scale] [-> Add bias]

The op supports half precision, and sums in float32 inside. If a norm stayed written out in float32 between casts, ONNX
Runtime's LayerNormFusion would build a node with two types and then refuse it
(findings/layernorm_fusion_mixed_types.sh).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.graph import constant, insert, topological, values
from trimtab.passes.precision.tensors import is_float

_CHAIN = frozenset(["Add", "Div", "Mul", "Pow", "ReduceMean", "Sqrt", "Sub"])


@dataclass(frozen=True)
class _Core:
    """(x - mean) / sqrt(variance + epsilon) over the last axes of `x`, which have `sizes`."""

    x: gs.Tensor
    sizes: tuple[int, ...]
    epsilon: float


def fuse_norms(graph: gs.Graph, keep: Collection[str] = ()) -> None:
    """Replace written-out LayerNorms in float32 by LayerNormalization. Types and shapes must be known (`infer_shapes`).

    Norms over unknown sizes, or with an op of `keep`, are not replaced. Their square becomes a product, so that ONNX
    Runtime does not fuse them either.
    """
    outputs = {id(tensor) for tensor in graph.outputs}
    for node in topological(graph):
        core = _core(node) if node.op == "Div" and not _CHAIN & set(keep) else None
        if core is not None:
            _fuse(graph, node, core, outputs)
    for node in graph.nodes:
        if node.op == "Pow" and _squares(node) and _centred(node.inputs[0]) is not None:
            node.op, node.inputs = "Mul", [node.inputs[0], node.inputs[0]]
    graph.nodes = topological(graph)


def _fuse(graph: gs.Graph, last: gs.Node, core: _Core, outputs: set[int]) -> None:
    """Replace the norm whose quotient is `last`, with its scale and bias if these are constants."""
    quotient = last
    scale, bias = np.ones(core.sizes, np.float32), None
    multiplied = _affine(last, "Mul", core.sizes, outputs)
    if multiplied is not None:
        last, scale = multiplied
    added = _affine(last, "Add", core.sizes, outputs)
    if added is not None:
        last, bias = added
    (result,) = last.outputs
    name = f"precision/{quotient.outputs[0].name}"
    affine = {"scale": scale} if bias is None else {"scale": scale, "bias": bias}
    weights = [constant(f"{name}/{key}", array) for key, array in affine.items()]
    last.outputs.clear()
    attrs: dict[str, object] = {"axis": -len(core.sizes), "epsilon": core.epsilon}
    insert(graph, "LayerNormalization", [core.x, *weights], f"{name}/norm", attrs=attrs, outputs=[result])
    _remove(graph, last, outputs)


def _affine(node: gs.Node, op: str, sizes: tuple[int, ...], outputs: set[int]) -> tuple[gs.Node, np.ndarray] | None:
    """The only reader of `node`, if it is an `op` with a constant that has one number, or one for each of `sizes`."""
    (result,) = node.outputs
    if id(result) in outputs or len(result.outputs) != 1 or result.outputs[0].op != op:
        return None
    reader = result.outputs[0]
    others = [tensor for tensor in reader.inputs if tensor is not result]
    if len(others) != 1 or not isinstance(others[0], gs.Constant) or not is_float(others[0]):
        return None
    shape = tuple(others[0].shape)
    if result.shape is None or len(shape) > len(result.shape):
        return None
    while len(shape) > len(sizes) and shape[0] == 1:
        shape = shape[1:]
    if len(shape) > len(sizes) or any(a not in (1, b) for a, b in zip(shape[::-1], sizes[::-1], strict=False)):
        return None
    return reader, np.broadcast_to(values(others[0]).reshape(shape), sizes)


def _remove(graph: gs.Graph, node: gs.Node, outputs: set[int]) -> None:
    """Remove `node`, and then the nodes before it that have no readers left."""
    pending = [node]
    while pending:
        node = pending.pop()
        if any(tensor.outputs or id(tensor) in outputs for tensor in node.outputs):
            continue
        pending += {id(maker): maker for tensor in node.inputs for maker in tensor.inputs}.values()
        node.inputs.clear()
        node.outputs.clear()
        graph.nodes = [each for each in graph.nodes if each is not node]


def _core(node: gs.Node) -> _Core | None:
    """The core of the LayerNorm that ends in the Div `node`; None if none does."""
    root = _maker(node.inputs[1], "Sqrt")
    total = _maker(root.inputs[0], "Add") if root else None
    if total is None or not is_float(node.outputs[0]) or node.outputs[0].shape is None:
        return None
    numbers = [tensor for tensor in total.inputs if isinstance(tensor, gs.Constant)]
    means = [mean for tensor in total.inputs if (mean := _maker(tensor, "ReduceMean"))]
    if len(numbers) != 1 or len(means) != 1 or int(np.prod(numbers[0].shape)) != 1:
        return None
    squared, centred = _squared(means[0].inputs[0]), _centred(node.inputs[0])
    if squared is None or centred is None or squared[0] is not centred[0]:
        return None
    x, axes = centred
    if x.shape is None or not is_float(x) or len({axes, squared[1], _axes(means[0])}) != 1 or not axes:
        return None
    sizes = tuple(x.shape[axes[0] :])
    if axes != tuple(range(-len(axes), 0)) or not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    return _Core(x, sizes, float(values(numbers[0]).reshape(())))


def _squared(tensor: gs.Tensor) -> tuple[gs.Tensor, tuple[int, ...]] | None:
    """`_centred` of the tensor whose square is `tensor`; None if it is no square."""
    power, product = _maker(tensor, "Pow"), _maker(tensor, "Mul")
    if power is not None and _squares(power):
        return _centred(power.inputs[0])
    if product is not None and product.inputs[0] is product.inputs[1]:
        return _centred(product.inputs[0])
    return None


def _centred(tensor: gs.Tensor) -> tuple[gs.Tensor, tuple[int, ...]] | None:
    """x, and the axes (negative, in order), if `tensor` is x - mean(x); else None."""
    difference = _maker(tensor, "Sub")
    mean = _maker(difference.inputs[1], "ReduceMean") if difference else None
    if difference is None or mean is None or _bare(mean.inputs[0]) is not _bare(difference.inputs[0]):
        return None
    return _bare(difference.inputs[0]), _axes(mean)


def _axes(mean: gs.Node) -> tuple[int, ...]:
    """The axes of a ReduceMean that keeps them, negative and in order; () if they are unknown, or all axes."""
    axes_input = mean.inputs[1] if len(mean.inputs) > 1 else None
    if not mean.attrs.get("keepdims", 1) or not isinstance(axes_input, gs.Constant) or mean.inputs[0].shape is None:
        return ()
    rank = len(mean.inputs[0].shape)
    return tuple(sorted(int(axis) - rank if axis >= 0 else int(axis) for axis in values(axes_input).reshape(-1)))


def _maker(tensor: gs.Tensor, op: str) -> gs.Node | None:
    """The node that computes `tensor`, if it is an `op`."""
    tensor = _bare(tensor)
    node = tensor.inputs[0] if tensor.inputs else None
    return node if node is not None and node.op == op and node.domain in (None, "", "ai.onnx") else None


def _bare(tensor: gs.Tensor) -> gs.Tensor:
    """`tensor` before casts that do not change the type, which exporters write before a Pow."""
    while tensor.inputs and tensor.inputs[0].op in ("Cast", "Identity") and is_float(tensor):
        before = tensor.inputs[0].inputs[0]
        if not is_float(before):
            break
        tensor = before
    return tensor


def _squares(power: gs.Node) -> bool:
    """Whether the Pow `power` is a square with the shape of its base."""
    base, exponent = power.inputs
    if not isinstance(exponent, gs.Constant) or int(np.prod(exponent.shape)) != 1:
        return False
    fits = len(exponent.shape) <= (1 if base.shape is None else len(base.shape))
    return fits and float(values(exponent).item()) == 2
