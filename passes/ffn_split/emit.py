"""A fitted split as nodes in the graph."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.anatomy import FFN, clone_activation
from trimtab.passes.ffn_split.plan import Neurons, Split
from trimtab.passes.graph import constant, insert, replace_uses
from trimtab.passes.matrices.forms import LowRank


def emit(graph: gs.Graph, ffn: FFN, split: Split) -> None:
    """Put `split` in the place of `ffn`; the dense nodes are left without use for the clean-up."""
    name = f"ffn-split/layer.{ffn.layer}"
    dtype = np.dtype(ffn.y.dtype or np.float32)
    y: gs.Tensor | None = None
    rest = split.rest
    if split.heavy is not None:
        joined = _joined(split.heavy, rest) if isinstance(rest, LowRank) else None
        if isinstance(rest, LowRank) and joined is not None:
            y = _neurons(graph, ffn, joined, f"{name}/heavy", dtype, around=rest.rank)
            rest = None
        else:
            y = _neurons(graph, ffn, split.heavy, f"{name}/heavy", dtype)
    if split.bias is not None:
        bias = constant(f"{name}/bias", split.bias.astype(dtype))
        before = _zeros(graph, ffn, name, dtype) if y is None else y
        y = insert(graph, "Add", [before, bias], f"{name}/shift", dtype=dtype)
    if rest is not None:
        other = (
            rest.emit(graph, ffn.x, f"{name}/rest", dtype)
            if isinstance(rest, LowRank)
            else _neurons(graph, ffn, rest, f"{name}/rest", dtype)
        )
        y = other if y is None else insert(graph, "Add", [y, other], f"{name}/join", dtype=dtype)
    assert y is not None, "a split without parts always has a bias"
    replace_uses(graph, ffn.y, y)


def _zeros(graph: gs.Graph, ffn: FFN, name: str, dtype: np.dtype) -> gs.Variable:
    """Zeros in the shape of the output, for an FFN of which only its bias is left."""
    return insert(graph, "Mul", [ffn.x, constant(f"{name}/zero", np.zeros((), dtype))], f"{name}/nothing", dtype=dtype)


def _joined(heavy: Neurons, rest: LowRank) -> Neurons | None:
    """FFN1 with the map's first matrix beside its first one and the second below its last; None if forms differ.

    Two thin products more would take as long as the map saves.
    """
    up, down = heavy.ups[0].joined(rest.left, 1), heavy.down.joined(rest.right, 0)
    return None if up is None or down is None else Neurons((up, *heavy.ups[1:]), heavy.up_biases, down)


def _neurons(graph: gs.Graph, ffn: FFN, part: Neurons, name: str, dtype: np.dtype, *, around: int = 0) -> gs.Variable:
    """Nodes that compute `part`; the last `around` features of its first matrix go around the activation."""
    labels = ("gate", "up") if ffn.gated else ("up",)
    linear: gs.Tensor | None = None
    pre: list[gs.Tensor] = []
    for label, matrix, bias in zip(labels, part.ups, part.up_biases, strict=True):
        out = matrix.emit(graph, ffn.x, f"{name}/{label}", dtype)
        if around and not pre:
            neurons = matrix.array.shape[1] - around
            out, linear = _parted(graph, out, (neurons, around), f"{name}/{label}/part", dtype)
        if bias is not None:
            shift = constant(f"{name}/{label}.bias", bias.astype(dtype))
            out = insert(graph, "Add", [out, shift], f"{name}/{label}/shift", dtype=dtype)
        pre.append(out)
    hidden = clone_activation(graph, ffn.activation, pre, name)
    if linear is not None:
        hidden = insert(graph, "Concat", [hidden, linear], f"{name}/around", attrs={"axis": -1}, dtype=dtype)
    return part.down.emit(graph, hidden, f"{name}/down", dtype)


def _parted(
    graph: gs.Graph, tensor: gs.Tensor, sizes: tuple[int, int], name: str, dtype: np.dtype
) -> tuple[gs.Variable, gs.Variable]:
    outputs = gs.Variable(f"{name}.0", dtype=dtype), gs.Variable(f"{name}.1", dtype=dtype)
    as_input = graph.opset >= 13  # an attribute before
    inputs = [tensor, constant(f"{name}.sizes", np.array(sizes))] if as_input else [tensor]
    attrs: dict[str, object] = {"axis": -1} if as_input else {"axis": -1, "split": list(sizes)}
    insert(graph, "Split", inputs, name, attrs=attrs, outputs=list(outputs))
    return outputs
