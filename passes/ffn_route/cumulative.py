"""Selection by cumulative probability: the best groups, until their scores reach a share of the sum of all scores."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.graph import constant, insert


def shares_before(graph: gs.Graph, scores: gs.Tensor, groups: int, at: str) -> gs.Variable:
    """The missing share of each group, [..., groups]: 1 minus the share of the sum that better groups have.

    A group is computed if its missing share is not below the dial, which is 1 minus the wanted share. The missing share
    is above 0 for every group, however small its score.
    """

    def node(op: str, inputs: list[gs.Tensor], key: str, **attrs: object) -> gs.Variable:
        y = insert(graph, op, inputs, f"{at}/share/{key}", attrs=attrs, dtype=np.float32)
        y.shape = scores.shape
        return y

    def number(key: str, value: object) -> gs.Constant:
        return constant(f"{at}/share/{key}", np.asarray(value))

    ordered, places = (
        gs.Variable(f"{at}/share/{key}", dtype, scores.shape)
        for key, dtype in (("ordered", np.float32), ("places", np.int64))
    )
    graph.nodes.append(
        gs.Node(
            "TopK", f"{at}/share/order", {"axis": -1}, [scores, number("all", np.array([groups]))], [ordered, places]
        )
    )
    # the sum of a group's and all lower scores, from the last one on: positive terms never round to 0
    left = node("CumSum", [ordered, number("axis", np.array(-1))], "left", reverse=1)
    total = node(
        "Slice",
        [left, number("first", np.array([0])), number("second", np.array([1])), number("last", np.array([-1]))],
        "total",
    )
    total.shape = None if scores.shape is None else [*scores.shape[:-1], 1]
    missing = node("Div", [left, total], "missing")
    return node("ScatterElements", [scores, places, missing], "of_groups", axis=-1)
