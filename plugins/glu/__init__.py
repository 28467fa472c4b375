"""Glu: act(gate) * up of a gated FFN, whose gate and up are adjacent outputs of one product.

Gated linear units: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202). In standard ops it is three or more
nodes, each of which a decoder's step waits for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.plugins.dialect import Attribute, Form, Input, Op, Output, Value
from trimtab.plugins.sizes import Shapes, Size
from trimtab.plugins.sparse_up import ACTIVATIONS

__all__ = ["GLU"]


def _infer(shapes: Shapes, attributes: Mapping[str, Value]) -> list[Any] | None:
    x = shapes["x"]
    if x is None:
        return None
    return [*x[:-1], x[-1] // 2 if isinstance(x[-1], int) else Size()]


def _body(form: Form) -> str:
    gate, up = ("first", "second") if form.attributes["gate"] == 0 else ("second", "first")
    act = "\n".join("  " + line.format(x=gate) for line in ACTIVATIONS[str(form.attributes["activation"])])
    return f"  first, second = Split <axis = -1, num_outputs = 2> (x)\n{act}\n  y = Mul (act, {up})\n"


GLU = Op(
    "Glu",
    doc="act(gate) * up, where x is gate and up side by side.",
    inputs=(Input("x", ("tensor(float)",), "[..., 2 neurons]"),),
    outputs=(Output("y", "x", "[..., neurons]", _infer),),
    attributes=(
        Attribute("activation", "silu", "of the gate", tuple(ACTIVATIONS)),
        Attribute("gate", 0, "which half of x it is, 0 or 1"),
    ),
    body=_body,
)
