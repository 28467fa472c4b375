"""Replaces act(gate) * up by the op Glu, where one product computes both gate and up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.anatomy.activation import evaluate, is_elementwise, name_of
from trimtab.passes.anatomy.scan import only_producer
from trimtab.passes.graph import replace_uses
from trimtab.plugins import GLU, add_node
from trimtab.plugins.dialect import OPSET
from trimtab.plugins.sparse_up import ACTIVATIONS


@dataclass(frozen=True)
class _Gated:
    """act(gate) * up: which of two tensors is the gate, the activation, and the result."""

    gate: int
    activation: str
    hidden: gs.Variable


@dataclass
class Glus:
    """Replaces act(gate) * up by Glu. A model has one body per op, so the first Glu determines the form of all."""

    graph: gs.Graph
    enabled: bool
    _form: tuple[int, str] | None = field(default=None, init=False)

    def fits(self, parts: Sequence[gs.Tensor]) -> _Gated | None:
        """The act(gate) * up of two float32 tensors if Glu can compute it and they have no other readers."""
        if not self.enabled or self.graph.opset < OPSET or len(parts) != 2:
            return None
        if self._form is None and any(function.name == GLU.name for function in self.graph.functions):
            return None  # the model has been compiled before
        outputs = {id(tensor) for tensor in self.graph.outputs}
        for gate in (0, 1):
            gated = _gated(parts, gate, outputs)
            if gated is not None and (gated.gate, gated.activation) == (self._form or (gated.gate, gated.activation)):
                return gated
        return None

    def put(self, y: gs.Variable, gated: _Gated) -> None:
        """Replace act(gate) * up by Glu of `y`, which contains both side by side."""
        self._form = gated.gate, gated.activation
        name = f"settle/{gated.hidden.name}"
        h = add_node(self.graph, GLU, {"x": y}, name, activation=gated.activation, gate=gated.gate)
        h.shape = gated.hidden.shape
        replace_uses(self.graph, gated.hidden, h)


def _gated(parts: Sequence[gs.Tensor], gate: int, outputs: set[int]) -> _Gated | None:
    x, up = parts[gate], parts[1 - gate]
    product = up.outputs[0] if len(up.outputs) == 1 else None
    if product is None or product.op != "Mul" or product.domain or (up.dtype is not None and up.dtype != np.float32):
        return None
    act = next((tensor for tensor in product.inputs if tensor is not up), None)
    nodes = None if act is None else _between(x, act)
    if act is None or nodes is None or (act is not x and not nodes):
        return None
    inner = [x, *(node.outputs[0] for node in nodes)]
    readers = {id(node) for node in (*nodes, product)}
    if any(id(tensor) in outputs or any(id(node) not in readers for node in tensor.outputs) for tensor in [up, *inner]):
        return None
    name = name_of(lambda values: evaluate(nodes, {id(x): values}, act))
    return _Gated(gate, name, product.outputs[0]) if name in ACTIVATIONS else None


def _between(x: gs.Tensor, y: gs.Tensor) -> list[gs.Node] | None:
    """The elementwise nodes, in order, that compute y from x and scalars only; None if y depends on more."""
    visited: dict[int, gs.Node] = {}

    def visit(tensor: gs.Tensor) -> bool:
        if tensor is x:
            return True
        if isinstance(tensor, gs.Constant):
            return len(tensor.shape) <= 1 and int(np.prod(tensor.shape, dtype=np.int64)) == 1
        node = only_producer(tensor)
        if node is None or not is_elementwise(node) or len(visited) > _MAX_NODES:
            return False
        if id(node) not in visited:
            if not all(visit(each) for each in node.inputs if each.name):
                return False
            visited[id(node)] = node
        return True

    return list(visited.values()) if visit(y) else None


_MAX_NODES = 32
"""Maximum number of nodes of an activation."""
