"""Writes the rest map, which approximates the neurons left out, into the graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.graph import constant, insert
from trimtab.passes.sparse_ffn.rest import Rest

_Node = Callable[..., gs.Variable]


class RestNodes:
    """The constants of a `Rest`, and the nodes of each FFN that uses it.

    The nodes compute (s · [x A, 1]) [B; c]: the share s multiplies rank + 1 numbers per token, not the whole output.

    Args:
        name: prefix of the constants' names.
        blocks: number of the FFN's blocks of neurons.
        taken: limit of the blocks that a token computes.
        at_most: tokens compute different numbers of blocks, and each token has its own s.
        dense_above: calls of more tokens compute all blocks, so s is 0; -1: no limit.
    """

    def __init__(
        self, rest: Rest, name: str, *, blocks: int, taken: int, at_most: bool = False, dense_above: int = -1
    ) -> None:  # fmt: skip
        self._at_most, self._rank = at_most, rest.rank
        one = np.zeros(rest.rank + 1, np.float32)
        one[-1] = 1
        beyond = np.array((blocks - taken) / blocks, np.float32)  # what every token leaves out
        right = np.vstack([rest.right, rest.shift])
        self._left = constant(f"{name}/left.weight", np.pad(rest.left, ((0, 0), (0, 1))))
        self._one = constant(f"{name}/left.bias", one)
        self._right = constant(f"{name}/right.weight", right if at_most else right * beyond)
        self._beyond = constant(f"{name}/beyond", beyond) if at_most and taken < blocks else None
        self._each = constant(f"{name}/of_each", np.full((taken, 1), 1 / blocks, np.float32))
        self._none = constant(f"{name}/zero", np.zeros((), np.int32))
        self._first = [constant(f"{name}/first.{i}", np.array([value])) for i, value in enumerate((0, taken, 1))]
        self._limit: gs.Constant | None = None
        if dense_above >= 0 and taken < blocks:
            self._limit = constant(f"{name}/dense_above", np.array(dense_above * len(rest.left)))

    def __call__(self, graph: gs.Graph, x: gs.Tensor, blocks: gs.Tensor, at: str) -> gs.Variable:
        """Append the nodes of the map; returns its output, to be added to the FFN's output, in the shape of `x`.

        Args:
            x: the FFN's input, [..., d_model].
            blocks: numbers of the computed blocks, [tokens or 1, taken], filled up with -1.
            at: prefix of the nodes' names.
        """

        def node(
            op: str, inputs: list[gs.Tensor], key: str, dtype: object = np.float32, **attrs: object
        ) -> gs.Variable:
            return insert(graph, op, inputs, f"{at}/rest/{key}", attrs=attrs, dtype=dtype)

        few = node("MatMul", [x, self._left], "left")
        both = node("Add", [few, self._one], "both")
        if x.shape is not None:
            few.shape = both.shape = [*x.shape[:-1], self._rank + 1]
        in_rows = self._at_most and (x.shape is None or len(x.shape) != 2)
        if in_rows:  # as s is
            both = node("Reshape", [both, constant(f"{at}/rest/rows", np.array([-1, self._rank + 1]))], "in_rows")
        for share in self._shares(node, x, blocks):
            both = node("Mul", [both, share], f"scaled.{share.name.rsplit('/', 1)[-1]}")
        y = node("MatMul", [both, self._right], "right")
        if in_rows:
            y = node("Reshape", [y, node("Shape", [x], "size", np.int64)], "y", allowzero=1)
        y.shape = x.shape
        return y

    def _shares(self, node: _Node, x: gs.Tensor, blocks: gs.Tensor) -> list[gs.Variable]:
        """Factors of [x A, 1], scalars or [tokens or 1, 1]. Their product is s, unless the second matrix contains s."""
        factors = []
        if self._limit is not None:
            few = node("LessOrEqual", [node("Size", [x], "values", np.int64), self._limit], "few", np.bool_)
            factors.append(node("Cast", [few], "sparse", to=1))
            blocks = node("Slice", [blocks, *self._first], "first", np.int32) if self._at_most else blocks
        if self._at_most:
            none = node("Less", [blocks, self._none], "none", np.bool_)
            share = node(
                "MatMul", [node("Cast", [none], "spared", to=1), self._each], "share"
            )  # ReduceSum errs at 0 rows
            factors.append(share if self._beyond is None else node("Add", [share, self._beyond], "share_beyond"))
        return factors
