"""Int4Linear: x W + b with int4 weights in blocks of 32 inputs, and x rounded to bytes by the same blocks.

ONNX Runtime's MatMulNBits (accuracy_level 4) computes the same; of the small matrices of small models it reads at half
the bandwidth (docs/dialect.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.plugins.dialect import Form, Input, Op, Output, Value
from trimtab.plugins.rows import chosen_rows
from trimtab.plugins.sizes import Shapes, Size

__all__ = ["BLOCK", "INT4_LINEAR", "LARGEST"]

BLOCK = 32
"""Inputs that share a scale: of a weight, and of a row of x."""

LARGEST = 127
"""Largest integer of x, by magnitude."""

_FLOAT = ("tensor(float)",)


def _infer(shapes: Shapes, attributes: Mapping[str, Value]) -> list[Any] | None:
    x, weight = shapes["x"], shapes["weight"]
    if x is None:
        return None
    return [*x[:-1], Size() if weight is None else weight[0]]


def _body(form: Form) -> str:
    return f"{_ROUND}\n{chosen_rows(form, 'weight')}\n{_MULTIPLY}"


_ROUND = f"""
  last = Constant <value_ints = [-1]> ()
  first = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  two = Constant <value_ints = [2]> ()
  nothing = Constant <value_float = 0.0> ()
  levels = Constant <value_float = {LARGEST}.0> ()
  tiny = Constant <value_float = 7.8886090522101181e-31> ()
  block = Constant <value_ints = [{BLOCK}]> ()

  lead = Shape <end = -1> (x)
  width = Shape <start = -1> (x)
  count = Div (width, block)
  in_blocks = Concat <axis = 0> (lead, count, block)
  x_blocks = Reshape <allowzero = 1> (x, in_blocks)
  sizes = Abs (x_blocks)
  most_all = ReduceMax <keepdims = 1> (sizes, last)
  most = Slice (most_all, first, one, last)
  reach = Max (most, tiny)
  inverse = Div (levels, reach)
  steps = Mul (x_blocks, inverse)
  q = Round (steps)
  scale = Div (reach, levels)
  rounded_blocks = Mul (q, scale)
  x_shape = Shape (x)
  rounded = Reshape <allowzero = 1> (rounded_blocks, x_shape)
  x_nothing = Mul (x, nothing)
  nothing_all = ReduceSum <keepdims = 1> (x_nothing, last)
  spoilt = Slice (nothing_all, first, one, last)

  outputs = Shape <end = 1> (weight)
  zero_i = Constant <value_int = 0> ()
  one_i = Constant <value_int = 1> ()
  outputs_i = Squeeze (outputs, first)
  numbers = Range (zero_i, outputs_i, one_i)
  rows = Unsqueeze (numbers, first)
"""
"""What is not finite makes its row NaN: `spoilt` is 0 elsewhere. The slices are for 0 rows, of which ONNX Runtime
(1.31) reduces no axis."""

_MULTIPLY = """
  weight_t3 = Transpose <perm = [0, 2, 1]> (weight_rows)
  weight_t = Squeeze (weight_t3, first)
  products = MatMul (rounded, weight_t)
  biased = Add (products, bias)
  y = Add (biased, spoilt)
"""

INT4_LINEAR = Op(
    "Int4Linear",
    doc="x W + bias, with x rounded to integers in [-127, 127] by the largest of each 32 of a row, half to even. Sums "
    "within a block are exact. A row with values that are not finite becomes NaN.",
    inputs=(
        Input("x", _FLOAT, "[..., in_features], in_features a multiple of 32"),
        Input(
            "weight", ("tensor(uint8)",), "[out_features, in_features / 2], two to a byte, the first in the low half, "
            "zero at 8",
        ),
        Input("weight_scale", ("tensor(float)", "tensor(bfloat16)"), "[out_features, in_features / 32]"),
        Input("bias", _FLOAT, "[out_features]"),
    ),
    outputs=(Output("y", "x", "[..., out_features]", _infer),),
    attributes=(),
    body=_body,
)  # fmt: skip
