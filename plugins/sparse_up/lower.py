"""SparseUp, and what is left of its `keep`, in standard ops."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from trimtab.plugins.lowering import Nodes, Rows, like, product, type_of
from trimtab.plugins.sparse_up import ACTIVATIONS, SPARSE_UP
from trimtab.plugins.sparse_up.keep import KEEP_LARGEST

_FLOAT = np.dtype(np.float32)


def _sparse_up(nodes: Nodes, node: gs.Node, inputs: Mapping[str, gs.Tensor]) -> list[gs.Tensor]:
    """Its h, [..., k · block]."""
    x, block = inputs["x"], int(node.attrs["block"])
    chosen = Rows.of(nodes, inputs["blocks"], block, bool(node.attrs["at_most"]))
    up = product(nodes, x, inputs, "up", chosen)
    gate = product(nodes, x, inputs, "gate", chosen) if "gate" in inputs else None
    h = _activation(nodes, str(node.attrs["activation"]), up if gate is None else gate)
    h = chosen.only_taken(nodes, h if gate is None else nodes("Mul", h, up))
    if "importance" in inputs:
        counts = chosen.gather(nodes, nodes.values(inputs["importance"]).astype(np.float32))
        h = _keep(nodes, h, counts, block, _kept(node, inputs["blocks"]))
    return [like(nodes, nodes.cast(h, type_of(x)), x)]


def _keep_largest(nodes: Nodes, node: gs.Node, inputs: Mapping[str, gs.Tensor]) -> list[gs.Tensor]:
    """Its y, in the shape of h."""
    h, block = inputs["h"], int(node.attrs["block"])
    chosen = Rows.of(nodes, inputs["blocks"], block)
    counts = chosen.gather(nodes, nodes.values(inputs["importance"]).astype(np.float32))
    flat = nodes("Reshape", h, nodes("Concat", [-1, 1], nodes.size(h, -1), axis=0), dtype=type_of(h))
    return [nodes("Reshape", _keep(nodes, flat, counts, block, _kept(node, inputs["blocks"])), nodes("Shape", h))]


def _activation(nodes: Nodes, name: str, x: gs.Tensor) -> gs.Tensor:
    """The activation `name` of `x`, in its type."""
    statements = "\n".join(line.format(x="x") for line in ACTIVATIONS[name])
    body = onnx.parser.parse_function(f'<domain: "f", opset_import: ["": 18]> f (x) => (act)\n{{\n{statements}\n}}')
    known: dict[str, gs.Tensor] = {"x": x}
    for step in body.node:
        attrs = {a.name: onnx.helper.get_attribute_value(a) for a in step.attribute}
        if step.op_type == "Constant":
            known[step.output[0]] = nodes.tensor(np.array(attrs["value_float"], type_of(x)))
        else:
            known[step.output[0]] = nodes(step.op_type, *(known[i] for i in step.input), dtype=type_of(x), **attrs)
    return known["act"]


def _kept(node: gs.Node, blocks: gs.Tensor) -> int:
    """Blocks that `node` leaves as they are: no more than there are, which may be known when the model is compiled."""
    keep, there = int(node.attrs["keep"]), blocks.shape[-1] if blocks.shape else None
    return min(keep, there) if isinstance(there, int) else keep


def _keep(nodes: Nodes, h: gs.Tensor, importance: gs.Tensor, block: int, keep: int) -> gs.Tensor:
    """h [tokens, 1, n] with 0 for all but the `keep` blocks of the largest Σ |h| · importance [tokens or 1, n]."""
    if not keep:
        return h
    sizes = nodes("Mul", nodes("Abs", nodes.cast(h, _FLOAT)), nodes("Unsqueeze", importance, [1]))
    scores = nodes("ReduceSum", nodes("Reshape", sizes, [0, 0, -1, block]), [-1], keepdims=0)
    places = nodes.topk(scores, keep)[1]
    shape, taken = nodes("Shape", scores), nodes("Shape", places)
    none = nodes("Expand", np.zeros(1, np.float32), shape)
    mask = nodes("ScatterElements", none, places, nodes("Expand", np.ones(1, np.float32), taken), axis=-1)
    blocks = nodes("Reshape", h, [0, 0, -1, block])
    masked = nodes("Mul", blocks, nodes("Unsqueeze", nodes.cast(mask, type_of(h)), [-1]))
    return nodes("Reshape", masked, [0, 0, -1])


RULES = {SPARSE_UP: _sparse_up, KEEP_LARGEST: _keep_largest}
