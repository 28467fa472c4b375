"""Clones an FFN's activation, to apply it to other inputs."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from trimtab.passes.anatomy.model import Activation
from trimtab.passes.graph import insert


def clone_activation(graph: gs.Graph, activation: Activation, inputs: Sequence[gs.Tensor], name: str) -> gs.Tensor:
    """The output of a copy of the activation's elementwise nodes that reads `inputs`.

    The copy has the same nodes, so it computes the exporter's form of GELU exactly.

    Args:
        inputs: in the order of `activation.inputs`, of any width.
    """
    clones: dict[int, gs.Tensor] = {id(t): new for t, new in zip(activation.inputs, inputs, strict=True)}
    for number, node in enumerate(activation.nodes):
        out = gs.Variable(f"{name}/act.{number}", dtype=node.outputs[0].dtype)
        read = [clones.get(id(tensor), tensor) for tensor in node.inputs]
        insert(graph, node.op, read, f"{name}/act.{number}", attrs=dict(node.attrs), domain=node.domain, outputs=[out])
        clones[id(node.outputs[0])] = out
    return clones[id(activation.output)]
