"""Lowers a TopK with a larger k than TensorRT supports to several rounds."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.graph import values
from trimtab.plugins.lowering import Nodes, type_of

MAX_K = 3840
"""The largest k of one TopK in TensorRT (11.1 and TensorRT-RTX 1.7 refuse more)."""


def needs_rounds(node: gs.Node) -> bool:
    """Whether `node` is a TopK with a constant k above `MAX_K`."""
    return node.op == "TopK" and isinstance(node.inputs[1], gs.Constant) and int(values(node.inputs[1]).item()) > MAX_K


def in_rounds(nodes: Nodes, node: gs.Node) -> list[gs.Tensor]:
    """Values and indices of `node`, in its order: each round overwrites its choices, so that the next skips them.

    They are overwritten by the smallest value of the type (the largest, if the TopK takes the smallest). If the input
    contains that value and it would be chosen, its indices may repeat those of earlier rounds.
    """
    x, k = node.inputs[0], int(values(node.inputs[1]).item())
    axis, largest = int(node.attrs.get("axis", -1)), int(node.attrs.get("largest", 1))
    dtype = type_of(x)
    overwritten = _beyond(dtype, bool(largest))
    parts: list[tuple[gs.Tensor, gs.Tensor]] = []
    for start in range(0, k, MAX_K):
        name = nodes.next("TopK")
        outputs = [gs.Variable(f"{name}.values", dtype), gs.Variable(f"{name}.places", np.int64)]
        node_of_round = gs.Node(
            "TopK", name, attrs={"axis": axis, "largest": largest}, inputs=[x, nodes.tensor([min(MAX_K, k - start)])]
        )
        node_of_round.outputs = outputs
        nodes.graph.nodes.append(node_of_round)
        parts.append((outputs[0], outputs[1]))
        if start + MAX_K < k:
            filler = nodes("Expand", overwritten, nodes("Shape", outputs[1]))
            x = nodes("ScatterElements", x, outputs[1], filler, axis=axis, dtype=dtype)
    return [nodes("Concat", *(part[side] for part in parts), axis=axis) for side in (0, 1)]


def _beyond(dtype: np.dtype, largest: bool) -> np.ndarray:
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return np.array([info.min if largest else info.max], dtype)
    return np.array([-np.inf if largest else np.inf], dtype)
