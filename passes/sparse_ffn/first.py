"""The first projection of an FFN, which decides the important neurons. It is computed for all neurons."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.anatomy import FFN, clone_activation
from trimtab.passes.graph import constant, insert
from trimtab.passes.sampled_ffn import FFNWeights
from trimtab.passes.sparse_ffn.rows import Rows
from trimtab.plugins import SPARSE_UP, add_node


class FirstProjection:
    """act(x W + b) of all neurons, for FFNs that share their weights; W is the gate, or up without a gate.

    With float32 weights the projection stays one MatMul: all runtimes optimize it, and later passes can quantize it.
    Weights in other forms are stored as rows, like the other projections, and SparseUp reads all rows.

    Args:
        first, weights, rows, block, name: as for `SparseFFN`.
    """

    def __init__(self, first: FFN, weights: FFNWeights, rows: Rows, block: int, name: str) -> None:
        label = "gate" if first.gated else "up"
        w, bias = weights.ups[0], weights.up_biases[0]
        self._block, self._d_ff = block, first.d_ff
        self._weight: gs.Constant | None = None
        self._rows: dict[str, gs.Tensor] = {}
        if rows.form == "fp32":
            self._weight = rows.whole(first.linears[0], w, label, name)
        else:
            row_tensors = rows.of(first.linears[0], w.T, label, name)
            self._rows = {key.replace(label, "up", 1): tensor for key, tensor in row_tensors.items()}
            self._every = constant(f"{name}/all", np.arange(first.d_ff // block, dtype=np.int32)[None])
            if bias is None and any(other is not None for other in weights.up_biases):
                bias = np.zeros(first.d_ff, np.float32)  # a model has one form of SparseUp, with biases or without
        self._bias = None if bias is None else constant(f"{name}/{label}_bias", bias)
        self._one = constant(f"{name}/one", np.ones((), np.float32)) if first.gated else None

    def emit(self, graph: gs.Graph, ffn: FFN, at: str) -> gs.Variable:
        """Append the nodes that compute the activations of `ffn`, [..., d_ff]."""
        y = self._product(graph, ffn.x, f"{at}/first")
        pre: list[gs.Tensor] = [y] if self._one is None else [y, self._one]
        activations = clone_activation(graph, ffn.activation, pre, f"{at}/first")
        assert isinstance(activations, gs.Variable)
        activations.dtype, activations.shape = np.float32, y.shape
        return activations

    def _product(self, graph: gs.Graph, x: gs.Tensor, name: str) -> gs.Variable:
        """x W + b."""
        if self._weight is None:
            inputs = {"x": x, "blocks": self._every} | self._rows
            if self._bias is not None:
                inputs["up_bias"] = self._bias
            return add_node(graph, SPARSE_UP, inputs, f"{name}/product", block=self._block, at_most=1)
        shape = None if x.shape is None else [*x.shape[:-1], self._d_ff]
        y = insert(graph, "MatMul", [x, self._weight], f"{name}/product", dtype=np.float32)
        y.shape = shape
        if self._bias is not None:
            y = insert(graph, "Add", [y, self._bias], f"{name}/shifted", dtype=np.float32)
            y.shape = shape
        return y
