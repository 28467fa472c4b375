"""The ops SparseUp and SparseDown in the place of FFNs."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.anatomy import FFN
from trimtab.passes.graph import constant, insert, replace_uses
from trimtab.passes.layer import FFNWeights
from trimtab.passes.sparse_ffn.rows import INT4_BLOCK, RowForm, Rows, row_bytes
from trimtab.plugins import SPARSE_DOWN, SPARSE_UP, add_node
from trimtab.plugins.sparse_up import ACTIVATIONS


def unfit(ffn: FFN, block: int, form: RowForm) -> str | None:
    """Why an FFN cannot be computed by the sparse ops, in blocks of so many neurons with weights of `form`; or None."""
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
    """The constants of FFNs that share their weights, and the ops in the place of each.

    Args:
        first: one of them.
        weights: its weights.
        rows: makes the constants, each matrix once for all FFNs that read it.
        block: neighbouring neurons that are chosen together.
        name: of the constants.

    Attributes:
        nbytes: of the constants that were made.
    """

    def __init__(self, first: FFN, weights: FFNWeights, rows: Rows, block: int, name: str) -> None:
        self.block, self._form, before = block, rows.form, rows.nbytes
        labels = ("gate", "up") if first.gated else ("up",)
        self._ups: dict[str, gs.Tensor] = {}
        for label, linear, w, bias in zip(labels, first.linears, weights.ups, weights.up_biases, strict=False):
            self._ups |= rows.of(linear, w.T, label, name)
            if bias is not None:
                self._ups[f"{label}_bias"] = constant(f"{name}/{label}_bias", bias)
        self._downs = rows.of(first.down, weights.down, "down", name)
        self._shift = constant(f"{name}/bias", weights.down_bias) if np.any(weights.down_bias) else None
        self._row, self._matrices = row_bytes(rows.form, first.d_model), len(first.linears) - 1
        self.nbytes = rows.nbytes - before

    def read_bytes(self, blocks: float, kept: float | None = None) -> float:
        """Of the weights of so many blocks; `kept`: those of which W_down is read, where they are fewer."""
        return self._row * self.block * (self._matrices * blocks + (blocks if kept is None else kept))

    def put(
        self, graph: gs.Graph, ffn: FFN, blocks: gs.Tensor, at: str, *, importance: gs.Tensor | None = None,
        keep: int = 0, at_most: bool = False,
    ) -> None:  # fmt: skip
        """Compute `ffn` by its chosen blocks.

        Args:
            blocks: their numbers, [tokens or 1, k], int32.
            at: begins the names of the nodes.
            importance: of each neuron, by which the `keep` blocks that add most are kept.
            at_most: blocks may be -1.
        """
        given = {"x": ffn.x, "blocks": blocks} | self._ups
        if importance is not None:
            given["importance"] = importance
        shared = {"block": self.block, "at_most": int(at_most)}
        h = add_node(graph, SPARSE_UP, given, f"{at}/up.h", activation=ffn.activation.name, keep=keep, **shared)
        y = add_node(graph, SPARSE_DOWN, {"h": h, "blocks": blocks} | self._downs, f"{at}/down.y", **shared)
        if self._shift is not None:
            y = insert(graph, "Add", [y, self._shift], f"{at}/shift", dtype=np.float32)
        y.shape = ffn.y.shape
        replace_uses(graph, ffn.y, y)
