"""Groups FFNs that share weights: layers of ALBERT, steps of a Universal Transformer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.anatomy.activation import PROBES, evaluate
from trimtab.passes.anatomy.model import FFN, Activation
from trimtab.passes.graph.edit import output_name_of
from trimtab.passes.graph.linear import Linear
from trimtab.passes.graph.weights import values


def by_weights(ffns: Sequence[FFN]) -> list[tuple[FFN, ...]]:
    """`ffns` in groups that compute the same function with the same weights, ordered by their first members."""
    groups: list[list[FFN]] = []
    for ffn in ffns:
        same = next((group for group in groups if _same_function(group[0], ffn)), None)
        if same is None:
            groups.append([ffn])
        else:
            same.append(ffn)
    return [tuple(group) for group in groups]


def shares_weights(a: FFN, b: FFN) -> bool:
    """True if a projection of `a` and one of `b` read the same matrix."""
    return bool({id(linear.weight) for linear in a.linears} & {id(linear.weight) for linear in b.linears})


def sharing_partly(group: Sequence[FFN], ffns: Sequence[FFN]) -> list[FFN]:
    """The FFNs of `ffns` outside `group` that share a matrix with it."""
    members = {ffn.layer for ffn in group}
    return [ffn for ffn in ffns if ffn.layer not in members and shares_weights(group[0], ffn)]


def also_read_by(group: Sequence[FFN]) -> str | None:
    """A node outside `group` (FFNs that share weights) that reads one of its matrices; None if there is none."""
    own = {id(node) for ffn in group for linear in ffn.linears for node in linear.nodes}
    for linear in group[0].linears:
        for node in _readers(linear.weight):
            if id(node) not in own:
                return output_name_of(node)
    return None


def _readers(weight: gs.Tensor) -> Iterator[gs.Node]:
    """The nodes that use `weight`, directly or behind Transpose and Cast."""
    for node in weight.outputs:
        if node.op in ("Cast", "Transpose"):
            yield from _readers(node.outputs[0])
        else:
            yield node


def _same_function(a: FFN, b: FFN) -> bool:
    return (
        a.gated == b.gated
        and _same_activation(a.activation, b.activation)
        and all(_same_linear(one, other) for one, other in zip(a.linears, b.linears, strict=True))
    )


def _same_activation(a: Activation, b: Activation) -> bool:
    if a.name != "unknown" or b.name != "unknown":
        return a.name == b.name
    feeds = np.meshgrid(*[PROBES] * len(a.inputs))
    first, second = (
        evaluate(each.nodes, {id(t): x for t, x in zip(each.inputs, feeds, strict=True)}, each.output)
        for each in (a, b)
    )
    return np.array_equal(first, second, equal_nan=True)


def _same_linear(a: Linear, b: Linear) -> bool:
    same = a.weight is b.weight and a.transposed == b.transposed and _same_bias(a.bias, b.bias)
    if a.quantized is None or b.quantized is None:
        return same and a.quantized is b.quantized
    return same and all(x is y for x, y in zip(a.quantized.inputs[1:], b.quantized.inputs[1:], strict=False))


def _same_bias(a: gs.Constant | None, b: gs.Constant | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (a.dtype == b.dtype and np.array_equal(values(a).reshape(-1), values(b).reshape(-1)))
