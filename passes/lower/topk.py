"""TopK of more than TensorRT takes at once, in rounds."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.graph import values
from trimtab.plugins.lowering import Nodes, type_of

MOST = 3840
"""The largest k of one TopK in TensorRT (11.1 and TensorRT-RTX 1.7 refuse more)."""


def needs_rounds(node: gs.Node) -> bool:
    """Whether `node` is a TopK whose k is known, and too large for one."""
    return node.op == "TopK" and isinstance(node.inputs[1], gs.Constant) and int(values(node.inputs[1]).item()) > MOST


def in_rounds(nodes: Nodes, node: gs.Node) -> list[gs.Tensor]:
    """Values and places of `node`, sorted as it sorts them: what one round has taken is out of the way of the next.

    The least that a type holds (or the most, of the smallest) counts as taken: where that is among the inputs, and
    would be chosen, its places may be those of earlier rounds.
    """
    x, k = node.inputs[0], int(values(node.inputs[1]).item())
    axis, largest = int(node.attrs.get("axis", -1)), int(node.attrs.get("largest", 1))
    dtype = type_of(x)
    gone = _beyond(dtype, bool(largest))
    parts: list[tuple[gs.Tensor, gs.Tensor]] = []
    for start in range(0, k, MOST):
        name = nodes.next("TopK")
        outputs = [gs.Variable(f"{name}.values", dtype), gs.Variable(f"{name}.places", np.int64)]
        made = gs.Node(
            "TopK", name, attrs={"axis": axis, "largest": largest}, inputs=[x, nodes.tensor([min(MOST, k - start)])]
        )
        made.outputs = outputs
        nodes.graph.nodes.append(made)
        parts.append((outputs[0], outputs[1]))
        if start + MOST < k:
            filler = nodes("Expand", gone, nodes("Shape", outputs[1]))
            x = nodes("ScatterElements", x, outputs[1], filler, axis=axis, dtype=dtype)
    return [nodes("Concat", *(part[side] for part in parts), axis=axis) for side in (0, 1)]


def _beyond(dtype: np.dtype, largest: bool) -> np.ndarray:
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return np.array([info.min if largest else info.max], dtype)
    return np.array([-np.inf if largest else np.inf], dtype)
