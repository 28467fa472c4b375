"""SparseDown: what the chosen blocks of an FFN's neurons add to its output."""

from __future__ import annotations

from collections.abc import Mapping

from trimtab.plugins.dialect import ACTIVATION, INT32, WEIGHTS, Attribute, Form, Input, Op, Shape, Value
from trimtab.plugins.rows import as_input, chosen_rows, numbers_of_rows

__all__ = ["SPARSE_DOWN"]


def _infer(shapes: Mapping[str, Shape | None], attributes: Mapping[str, Value]) -> Shape | None:
    h, down = shapes["h"], shapes["down"]
    if h is None:
        return None
    scale = shapes["down_scale"]
    width = down[1] if down is not None else None
    packed = scale is not None and len(scale) == 2  # int4, two to a byte
    return [*h[:-1], width * 2 if packed and isinstance(width, int) else width]


def _body(form: Form) -> str:
    return "\n".join(
        [
            numbers_of_rows(form, "h"),
            chosen_rows(form, "down"),
            "  y_ = MatMul (flat, down_rows)",
            "  lead = Shape <end = -1> (h)",
            "  size = Shape <start = -1> (down_rows)",
            "  shape = Concat <axis = 0> (lead, size)",
            *as_input(form, "h", "y", "Reshape (y_, shape)"),
        ]
    )


SPARSE_DOWN = Op(
    "SparseDown",
    doc="h down, for the rows of `down` that belong to the chosen blocks. Kernels may round h to 16 bits of the "
    "largest of eight rows where weights are integers.",
    inputs=(
        Input("h", ACTIVATION, "[..., k · block], of the chosen neurons in order"),
        Input("blocks", INT32, "[tokens, k], or [1, k] for all tokens"),
        Input("down", WEIGHTS, "[neurons, width]; int4 as uint8 [neurons, width / 2]"),
        Input(
            "down_scale",
            ACTIVATION,
            "of integer weights: [neurons] for int8, [neurons, width / 32] for int4",
            optional=True,
        ),
    ),
    output=("y", "h"),
    attributes=(Attribute("block", 1, "neurons in a block"),),
    infer=_infer,
    body=_body,
)
