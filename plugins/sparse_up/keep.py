"""KeepLargest: what `keep` of SparseUp does, as an op of its own for where one launch cannot look at a whole token.

It has no kernels: its reference body, in standard ops, is all that there is of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.plugins.dialect import ACTIVATION, INT32, Attribute, Form, Input, Op, Output, Value
from trimtab.plugins.rows import numbers_of_rows, shaped
from trimtab.plugins.sizes import Shapes
from trimtab.plugins.sparse_up import kept

__all__ = ["KEEP_LARGEST"]


def _infer(shapes: Shapes, attributes: Mapping[str, Value]) -> list[Any] | None:
    h = shapes["h"]
    return None if h is None else [*h]


def _body(form: Form) -> str:
    return "\n".join(
        [
            numbers_of_rows(form, "h"),
            "  all_ = Identity (flat)",
            kept(form),
            "  y_ = Identity (h_)",
            *shaped(form, "h", "y", "all_"),
        ]
    )


KEEP_LARGEST = Op(
    "KeepLargest",
    doc="h, with 0 for all but the `keep` blocks of each token whose Σ |h| · importance is largest.",
    inputs=(
        Input("h", ACTIVATION, "[..., k · block], activations of the chosen neurons in order"),
        Input("blocks", INT32, "[tokens, k], or [1, k] for all tokens", role="choice"),
        Input("importance", ACTIVATION, "[neurons]: what one unit of a neuron's activation counts", role="rows"),
    ),
    outputs=(Output("y", "h", "as h", _infer),),
    attributes=(
        Attribute("block", 1, "neurons in a block"),
        Attribute("keep", 0, "blocks that are not set to 0; 0: all of them"),
    ),
    body=_body,
)
