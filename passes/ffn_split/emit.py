"""Writes a fitted split into the graph as nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.anatomy import FFN, clone_activation
from trimtab.passes.ffn_split.plan import Neurons, Split
from trimtab.passes.graph import constant, insert, replace_uses, values
from trimtab.passes.matrices.forms import LowRank, Product

_PASS = "ffn-split"


def emit(graph: gs.Graph, ffns: Sequence[FFN], split: Split) -> None:
    """Replace each of `ffns`, which have the same weights, by `split`. Its constants are stored once.

    The dense nodes remain unused, and the clean-up removes them.
    """
    first = ffns[0]
    name = f"{_PASS}/layer.{first.layer}"
    dtype = np.dtype(first.y.dtype or np.float32)
    heavy, rest = split.heavy, split.rest
    around = 0
    if heavy is not None and isinstance(rest, LowRank):
        joined = _join(heavy, rest)
        if joined is not None:
            around = rest.rank
            heavy, rest = joined, None
    uses = len(ffns)
    parts = _Parts(
        None if heavy is None else _StoredNeurons.of(heavy, first, f"{name}/heavy", dtype, uses, around),
        None if split.bias is None else constant(f"{name}/bias", split.bias.astype(dtype)),
        _StoredNeurons.of(rest, first, f"{name}/rest", dtype, uses) if isinstance(rest, Neurons) else None,
        rest.store(f"{name}/rest", dtype, uses) if isinstance(rest, LowRank) else None,
    )
    for ffn in ffns:
        replace_uses(graph, ffn.y, parts.emit(graph, ffn, dtype))


@dataclass(frozen=True)
class _StoredNeurons:
    """Neurons with their constants in the graph.

    Attributes:
        around: number of the first matrix's last outputs, which bypass the activation.
        sizes: sizes of the Split into neurons and bypassing outputs; None without bypassing outputs.
    """

    ups: tuple[Product, ...]
    up_biases: tuple[gs.Constant | None, ...]
    down: Product
    around: int
    sizes: gs.Constant | None

    @classmethod
    def of(cls, part: Neurons, ffn: FFN, name: str, dtype: np.dtype, uses: int, around: int = 0) -> _StoredNeurons:
        labels = _labels(ffn)
        biases = [
            None if bias is None else constant(f"{name}/{label}.bias", bias.astype(dtype))
            for label, bias in zip(labels, part.up_biases, strict=True)
        ]
        neurons = part.ups[0].array.shape[1] - around
        return cls(
            tuple(m.store(f"{name}/{label}", dtype, uses) for label, m in zip(labels, part.ups, strict=True)),
            tuple(biases),
            part.down.store(f"{name}/down", dtype, uses),
            around,
            constant(f"{name}/{labels[0]}/part.sizes", np.array((neurons, around))) if around else None,
        )

    def emit(self, graph: gs.Graph, ffn: FFN, name: str, dtype: np.dtype) -> gs.Variable:
        linear: gs.Tensor | None = None
        pre: list[gs.Tensor] = []
        for label, product, bias in zip(_labels(ffn), self.ups, self.up_biases, strict=True):
            out = product(graph, ffn.x, f"{name}/{label}")
            if self.sizes is not None and not pre:
                out, linear = _split_output(graph, out, self.sizes, f"{name}/{label}/part", dtype)
            if bias is not None:
                out = insert(graph, "Add", [out, bias], f"{name}/{label}/shift", dtype=dtype)
            pre.append(out)
        hidden = clone_activation(graph, ffn.activation, pre, name)
        if linear is not None:
            hidden = insert(graph, "Concat", [hidden, linear], f"{name}/around", attrs={"axis": -1}, dtype=dtype)
        return self.down(graph, hidden, f"{name}/down")


@dataclass(frozen=True)
class _Parts:
    """The parts of a split with their constants in the graph; None for a part that the split does not have."""

    heavy: _StoredNeurons | None
    bias: gs.Constant | None
    rest: _StoredNeurons | None
    linear: Product | None

    def emit(self, graph: gs.Graph, ffn: FFN, dtype: np.dtype) -> gs.Tensor:
        """Append the nodes that compute the output of `ffn`; returns the output."""
        name = f"{_PASS}/layer.{ffn.layer}"
        y: gs.Tensor | None = None
        if self.heavy is not None:
            y = self.heavy.emit(graph, ffn, f"{name}/heavy", dtype)
        if self.bias is not None:
            before = _zeros(graph, ffn, name, dtype) if y is None else y
            y = insert(graph, "Add", [before, self.bias], f"{name}/shift", dtype=dtype)
        other: gs.Tensor | None = None
        if self.rest is not None:
            other = self.rest.emit(graph, ffn, f"{name}/rest", dtype)
        elif self.linear is not None:
            other = self.linear(graph, ffn.x, f"{name}/rest")
        if other is not None:
            y = other if y is None else insert(graph, "Add", [y, other], f"{name}/join", dtype=dtype)
        assert y is not None, "a split without parts always has a bias"
        return y


def _labels(ffn: FFN) -> tuple[str, ...]:
    return ("gate", "up") if ffn.gated else ("up",)


def _zeros(graph: gs.Graph, ffn: FFN, name: str, dtype: np.dtype) -> gs.Variable:
    """Zeros in the shape of the output, for an FFN of which only the bias remains."""
    return insert(graph, "Mul", [ffn.x, constant(f"{name}/zero", np.zeros((), dtype))], f"{name}/nothing", dtype=dtype)


def _join(heavy: Neurons, rest: LowRank) -> Neurons | None:
    """FFN1 joined with the map: the map's first matrix extends FFN1's first one, its second matrix FFN1's last one.

    Two separate thin products would cost the time that the map saves. Returns None if the forms differ.
    """
    up, down = heavy.ups[0].joined(rest.left, 1), heavy.down.joined(rest.right, 0)
    return None if up is None or down is None else Neurons((up, *heavy.ups[1:]), heavy.up_biases, down)


def _split_output(
    graph: gs.Graph, tensor: gs.Tensor, sizes: gs.Constant, name: str, dtype: np.dtype
) -> tuple[gs.Variable, gs.Variable]:
    outputs = gs.Variable(f"{name}.0", dtype=dtype), gs.Variable(f"{name}.1", dtype=dtype)
    as_input = graph.opset >= 13  # an attribute before
    inputs = [tensor, sizes] if as_input else [tensor]
    attrs: dict[str, object] = {"axis": -1} if as_input else {"axis": -1, "split": list(values(sizes))}
    insert(graph, "Split", inputs, name, attrs=attrs, outputs=list(outputs))
    return outputs
