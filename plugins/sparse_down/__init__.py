"""SparseDown: what the chosen blocks of an FFN's neurons add to its output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.plugins.dialect import ACTIVATION, INT32, WEIGHTS, Attribute, Form, Input, Op, Output, Value
from trimtab.plugins.rows import chosen_rows, numbers_of_rows, shaped
from trimtab.plugins.sizes import Shapes, Size

__all__ = ["SPARSE_DOWN"]


def _infer(shapes: Shapes, attributes: Mapping[str, Value]) -> list[Any] | None:
    h, down, scale = shapes["h"], shapes["down"], shapes.get("down_scale")
    if h is None:
        return None
    width = Size() if down is None else down[1]
    return [*h[:-1], width * (2 if scale is not None and len(scale) == 2 else 1)]  # int4 has two to a byte


def _body(form: Form) -> str:
    return "\n".join(
        [
            numbers_of_rows(form, "h"),
            chosen_rows(form, "down"),
            "  nothing = Constant <value_float = 0.0> ()",
            "  used = Where (taken, flat, nothing)",
            "  y_ = MatMul (used, down_rows)",
            *shaped(form, "h", "y", "down_rows"),
        ]
    )


SPARSE_DOWN = Op(
    "SparseDown",
    doc="h down, for the rows of `down` that belong to the chosen blocks. Kernels may round h to 16 bits of the "
    "largest of eight rows where weights are integers, and to bytes of the largest of 32 where they are int8 and "
    "several tokens take a block.",
    inputs=(
        Input("h", ACTIVATION, "[..., k · block], of the chosen neurons in order"),
        Input("blocks", INT32, "[tokens, k], or [1, k] for all tokens; with at_most, -1 is none", role="choice"),
        Input("down", WEIGHTS, "[neurons, width]; int4 as uint8 [neurons, width / 2]", role="rows"),
        Input(
            "down_scale",
            ACTIVATION,
            "of integer weights: [neurons] for int8, [neurons, width / 32] for int4",
            optional=True,
            role="rows",
        ),
    ),
    outputs=(Output("y", "h", "[..., width]", _infer),),
    attributes=(
        Attribute("block", 1, "neurons in a block"),
        Attribute("at_most", 0, "1: blocks may be -1, at the end; 0: each is one"),
    ),
    body=_body,
    across_ranks="sum",
)
