"""A pass with two dials, for tests of the contract: it scales and shifts a model's first output, sample by sample."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes import PassContext, PassResult
from trimtab.passes.contract import Pass
from trimtab.passes.dials import Dial
from trimtab.passes.graph import constant, insert
from trimtab.passes.graph.edit import rename_output


class Dimmer(Pass):
    """y = (1 - dim) * y_dense + lift."""

    name: ClassVar[str] = "dimmer"
    summary: ClassVar[str] = "dims the first output"

    dim: float = 0.25

    def dials(self) -> tuple[Dial, ...]:
        return (
            Dial("dim", "how much of the output goes", 0.0, 0.9, self.dim, exact=0.0, fast=0.9),
            Dial("lift", "what is added to the output", -2.0, 2.0, 0.5, exact=0.0, fast=-2.0),
        )

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        (y,) = graph.outputs[:1]
        rank = len(y.shape)
        axes = constant("dimmer/axes", np.arange(1, rank))
        rows = [
            insert(graph, "Unsqueeze", [context.add_dial(graph, dial), axes], f"dimmer/{dial.name}", dtype=np.float32)
            for dial in self.dials()
        ]
        rest = insert(graph, "Sub", [constant("dimmer/one", np.float32(1)), rows[0]], "dimmer/rest", dtype=np.float32)
        dimmed = insert(graph, "Mul", [y, rest], "dimmer/dimmed", dtype=np.float32)
        rename_output(graph, y, insert(graph, "Add", [dimmed, rows[1]], "dimmer/lifted", dtype=np.float32))
        return PassResult(self.name, 1)


def expected(dense: np.ndarray, dim: float | np.ndarray, lift: float | np.ndarray) -> np.ndarray:
    """What a build with the pass gives, for dials of all samples or [batch] of them."""
    rows = [np.reshape(np.asarray(value), (-1,) + (1,) * (dense.ndim - 1)) for value in (dim, lift)]
    return np.asarray((1 - rows[0]) * dense + rows[1])
