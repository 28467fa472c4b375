"""SparseHead: exact logits of candidate rows of the vocabulary."""

from __future__ import annotations

from trimtab.plugins.dialect import ACTIVATION, INT32, WEIGHTS, Form, Input, Op, Output
from trimtab.plugins.rows import numbers_of_rows, shaped
from trimtab.plugins.sparse_up import infer_chosen, products

__all__ = ["SPARSE_HEAD"]


def _body(form: Form) -> str:
    return "\n".join(
        [
            numbers_of_rows(form, block="1"),
            *products(form, "weight"),
            "  logits_ = Identity (weight_y)",
            *shaped(form, "x", "logits", "rows"),
        ]
    )


SPARSE_HEAD = Op(
    "SparseHead",
    doc="x weightᵀ + bias, for the chosen rows of the vocabulary alone.",
    inputs=(
        Input("x", ACTIVATION, "[..., width]"),
        Input("blocks", INT32, "the rows: [tokens, k], or [1, k] for all tokens", role="choice"),
        Input("weight", WEIGHTS, "[vocabulary, width]; int4 as uint8 [vocabulary, width / 2]", role="rows"),
        Input(
            "weight_scale",
            ACTIVATION,
            "of integer weights: [vocabulary] for int8, [vocabulary, width / 32] for int4",
            optional=True,
            role="rows",
        ),
        Input("weight_bias", ACTIVATION, "[vocabulary]", optional=True, role="rows"),
    ),
    outputs=(Output("logits", "x", "[..., k]", infer_chosen),),
    attributes=(),
    body=_body,
    across_ranks="concat",
)
