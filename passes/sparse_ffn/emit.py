"""Replaces FFNs by the ops SparseUp and SparseDown."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.anatomy import FFN
from trimtab.passes.graph import constant, insert, replace_uses
from trimtab.passes.sampled_ffn import FFNWeights
from trimtab.passes.sparse_ffn.first import FirstProjection
from trimtab.passes.sparse_ffn.rest_nodes import RestNodes
from trimtab.passes.sparse_ffn.rows import INT4_BLOCK, RowForm, Rows, row_bytes
from trimtab.plugins import GATHER_BLOCKS, SPARSE_DOWN, SPARSE_UP, add_node
from trimtab.plugins.sparse_up import ACTIVATIONS


def unfit(ffn: FFN, block: int, form: RowForm) -> str | None:
    """Why the sparse ops cannot compute an FFN in blocks of `block` neurons with weights of `form`, or None."""
    if any(linear.quantized is not None for linear in ffn.linears):
        return "its weights are quantized already; choose `weights` of this pass instead"
    if ffn.activation.name not in ACTIVATIONS:
        return f"its activation ({ffn.activation.name}) is none of {', '.join(ACTIVATIONS)}"
    if ffn.d_ff % block:
        return f"blocks of {block} do not divide its {ffn.d_ff} neurons"
    if form == "int4" and ffn.d_model % INT4_BLOCK:
        return f"int4 blocks of {INT4_BLOCK} do not divide its {ffn.d_model} inputs"
    if np.dtype(ffn.y.dtype or np.float32) != np.float32:
        return f"it computes in {np.dtype(ffn.y.dtype).name}; the sparse ops take float32"
    return None


class SparseFFN:
    """The constants of FFNs that share their weights, and the sparse ops of each FFN.

    Args:
        first: one of the FFNs.
        weights: the shared weights.
        rows: creates the constants; FFNs that read the same matrix share a constant.
        block: neighbouring neurons that are chosen together.
        name: prefix of the constants' names.
        first_whole: the gate, or up without a gate, computes all neurons, and `put` receives its activations.

    Attributes:
        nbytes: bytes of the new constants.
        first: the projection that computes all neurons; None without `first_whole`.
    """

    def __init__(
        self, first: FFN, weights: FFNWeights, rows: Rows, block: int, name: str, *, first_whole: bool = False
    ) -> None:
        self.block, self._form, before = block, rows.form, rows.nbytes
        labels = ("gate", "up") if first.gated else ("up",)
        self._ups: dict[str, gs.Tensor] = {}
        self.first = FirstProjection(first, weights, rows, block, name) if first_whole else None
        for i, label in list(enumerate(labels))[int(first_whole) :]:
            self._ups |= rows.of(first.linears[i], weights.ups[i].T, label, name)
            bias = weights.up_biases[i]
            if bias is None and self.first is not None and weights.up_biases[0] is not None and rows.form != "fp32":
                bias = np.zeros(first.d_ff, np.float32)  # as FirstProjection does
            if bias is not None:
                self._ups[f"{label}_bias"] = constant(f"{name}/{label}_bias", bias)
        self._downs = rows.of(first.down, weights.down, "down", name)
        self._shift = constant(f"{name}/bias", weights.down_bias) if np.any(weights.down_bias) else None
        self._row, self._matrices = row_bytes(rows.form, first.d_model), len(labels) - int(first_whole)
        self._whole = row_bytes(rows.form, first.d_model) * first.d_ff if first_whole else 0
        self.nbytes = rows.nbytes - before

    def read_bytes(self, blocks: float, kept: float | None = None) -> float:
        """Bytes of the weights that `blocks` chosen blocks read.

        Args:
            kept: number of blocks whose rows of W_down are read; all chosen blocks by default.
        """
        chosen = self.block * (self._matrices * blocks + (blocks if kept is None else kept))
        return self._whole + self._row * chosen

    def put(
        self, graph: gs.Graph, ffn: FFN, blocks: gs.Tensor, at: str, *, importance: gs.Tensor | None = None,
        keep: int = 0, at_most: bool = False, activations: gs.Tensor | None = None, rest: RestNodes | None = None,
    ) -> None:  # fmt: skip
        """Replace `ffn` by ops that compute only its chosen blocks.

        Args:
            blocks: numbers of the chosen blocks, [tokens or 1, k], int32.
            at: prefix of the nodes' names.
            importance: importance of each neuron. Only the `keep` blocks that add most to the output are kept.
            at_most: blocks may be -1, which means none.
            activations: activations of all neurons after the first projection, [..., d_ff], with `first_whole`.
            rest: the rest map, which approximates the other blocks.
        """
        inputs = {"x": ffn.x, "blocks": blocks} | self._ups
        if importance is not None:
            inputs["importance"] = importance
        shared = {"block": self.block, "at_most": int(at_most)}
        if activations is None:
            h = add_node(graph, SPARSE_UP, inputs, f"{at}/up.h", activation=ffn.activation.name, keep=keep, **shared)
        else:
            h = add_node(graph, GATHER_BLOCKS, {"x": activations, "blocks": blocks}, f"{at}/first.h", **shared)
        if activations is not None and ffn.gated:
            up = add_node(graph, SPARSE_UP, inputs, f"{at}/up.h", **shared)
            size = h.shape
            h = insert(graph, "Mul", [h, up], f"{at}/gated.h", dtype=np.float32)
            h.shape = size
        y = add_node(graph, SPARSE_DOWN, {"h": h, "blocks": blocks} | self._downs, f"{at}/down.y", **shared)
        if rest is not None:
            y = insert(graph, "Add", [y, rest(graph, ffn.x, blocks, at)], f"{at}/with_rest", dtype=np.float32)
        if self._shift is not None:
            y.shape = ffn.y.shape
            y = insert(graph, "Add", [y, self._shift], f"{at}/shift", dtype=np.float32)
        y.shape = ffn.y.shape
        replace_uses(graph, ffn.y, y)
