"""An op for tests, with all that an op may have: several outputs, optional ones, and a size that two of them share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.plugins.dialect import ACTIVATION, Input, Op, Output, Value
from trimtab.plugins.sizes import Counted, Shapes


def _found(shapes: Shapes, attributes: Mapping[str, Value]) -> list[Any] | None:
    x = shapes["x"]
    return None if x is None else [Counted("found", x[0])]


_BODY = """
  places_ = NonZero (x)
  minus = Constant <value_ints = [-1]> ()
  flat = Reshape (places_, minus)
  values = Gather (x, flat)
  places = Cast <to = 6> (flat)
  total = ReduceSum <keepdims = 0> (x)
"""

COUNTING = Op(
    "Counting",
    doc="x [n] where it is not 0, the sum of it, and the places.",
    inputs=(Input("x", ACTIVATION, "[n]"),),
    outputs=(
        Output("values", "x", "[found]", _found),
        Output("total", "x", "[]", lambda shapes, attributes: [], optional=True),
        Output("places", "tensor(int32)", "[found]", _found, optional=True),
    ),
    attributes=(),
    body=lambda form: _BODY,
)
