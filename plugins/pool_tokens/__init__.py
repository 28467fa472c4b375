"""PoolTokens: one row for each sample of a packed batch, the mean of its tokens or the first of them.

It is what a classifier reads: behind the last layer, and at the exits of FastBERT (arXiv 2004.02178) between layers. In
standard ops it takes a dozen nodes, which for a single short text cost more than what they compute.

There is no GPU kernel: on a GPU the reference body runs; TensorRT's parser takes its ops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.plugins.dialect import ACTIVATION, INT32, Attribute, Form, Input, Op, Output, Value
from trimtab.plugins.rows import BOUNDS, CONSTANTS, MEMBERS, as_input, in_float
from trimtab.plugins.sizes import Shapes, Size

__all__ = ["POOL_TOKENS"]


def _pooled(shapes: Shapes, attributes: Mapping[str, Value]) -> list[Any] | None:
    x, offsets = shapes["x"], shapes["offsets"]
    if x is None:
        return None
    return [Size() if offsets is None else offsets[0] - 1, *x[1:]]


def _body(form: Form) -> str:
    rows = in_float(form, "x", "x", "rows", "Identity ({})")
    y = as_input(form, "x", "y", "MatMul (shares, rows)")
    return "\n".join([CONSTANTS, BOUNDS, _ENDS, MEMBERS, _SHARES, *rows, *y])


_ENDS = """
  most_ = Constant <value_int: int = @most> ()
  whole = Equal (most_, zero)
  limit = Where (whole, tokens_, most_)
  cut = Add (starts, limit)
  last = Min (ends, cut)
  ends_ = Unsqueeze (last, one)"""

# By a product with the shares of rows: no reduction, which ONNX Runtime 1.31 gets wrong for a batch of 0, no Gather,
# which has no row to read for a sample without tokens.
_SHARES = """
  many_ = Sub (ends_, starts_)
  many = Max (many_, one)
  of = Cast <to = 1> (many)
  shares = Div (belongs, of)"""


POOL_TOKENS = Op(
    "PoolTokens",
    doc="The mean of the first rows of each sample of a packed batch: of all that it has, or of `most`; 0 of a sample "
    "without rows. What is not finite spoils its own sample, and in the reference body all of them.",
    inputs=(
        Input("x", ACTIVATION, "[T, width], the rows of all samples, one sample behind the other"),
        Input("offsets", INT32, "[batch + 1], sample b has the rows from offsets[b] to offsets[b + 1]; the last is T"),
    ),
    outputs=(Output("y", "x", "[batch, width]", _pooled),),
    attributes=(Attribute("most", 0, "rows of a sample that count; 0: all"),),
    body=_body,
)
