"""GatherBlocks: the activations of the chosen blocks, of an FFN that has computed those of all its neurons."""

from __future__ import annotations

from trimtab.plugins.dialect import ACTIVATION, INT32, Attribute, Form, Input, Op, Output
from trimtab.plugins.rows import numbers_of_rows, shaped
from trimtab.plugins.sparse_up import infer_chosen

__all__ = ["GATHER_BLOCKS"]


def _body(form: Form) -> str:
    return "\n".join([numbers_of_rows(form), _STATEMENTS, *shaped(form, "x", "y", "rows")])


_STATEMENTS = """
  rows_ = Unsqueeze (rows, one)
  many = Shape <start = 0, end = 1> (flat)
  numbers_shape = Concat <axis = 0> (many, one, n_)
  numbers_ = Expand (rows_, numbers_shape)
  gathered = GatherElements <axis = 2> (flat, numbers_)
  nothing = Constant <value_float = 0.0> ()
  y_ = Where (taken, gathered, nothing)"""


GATHER_BLOCKS = Op(
    "GatherBlocks",
    doc="Of the numbers of all neurons of each token those of the chosen blocks, in order: as SparseUp gives them, "
    "where all are computed already.",
    inputs=(
        Input("x", ACTIVATION, "[..., neurons]"),
        Input("blocks", INT32, "[tokens, k], or [1, k] for all tokens; with at_most, -1 is none", role="choice"),
    ),
    outputs=(Output("y", "x", "[..., k · block], of the chosen neurons in order; 0 for a block -1", infer_chosen),),
    attributes=(
        Attribute("block", 1, "neurons in a block"),
        Attribute("at_most", 0, "1: blocks may be -1, at the end; 0: each is one"),
    ),
    body=_body,
)
