"""Int8Linear: act(x W + b) with integer products, where each row of x has a scale of its own.

ONNX Runtime's DynamicQuantizeLinear gives a whole tensor one scale, so what a sample gets depends on the others of its
batch. Here a row's result is the same, bit by bit, alone and in any batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.plugins.dialect import Attribute, Form, Input, Op, Output, Value
from trimtab.plugins.sizes import Shapes, Size
from trimtab.plugins.sparse_up import ACTIVATIONS

__all__ = ["INT8_LINEAR", "LARGEST", "LEVELS", "NUMBERS", "WIDEST"]

LEVELS = 255
"""Steps of a row of x between its least and its greatest value."""

LARGEST = 127
"""Largest integer of a weight, by magnitude: products are exact on every processor."""

WIDEST = 1 << 16
"""The most inputs: sums of more products could leave 32 bits."""

NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
"""Activation, as `trimtab.passes.anatomy` calls it → its number. A number, since nodes of a model differ in it and yet
share a reference body."""

_FLOAT, _INT8 = ("tensor(float)",), ("tensor(int8)",)


def _infer(shapes: Shapes, attributes: Mapping[str, Value]) -> list[Any] | None:
    x, weight = shapes["x"], shapes["weight"]
    if x is None:
        return None
    return [*x[:-1], Size() if weight is None else weight[1]]


def _body(form: Form) -> str:
    branch = ""
    for name, number in reversed(NUMBERS.items()):
        act = " ".join(line.format(x="sum") for line in ACTIVATIONS[name])
        if not branch:  # the last one is what is left
            branch = f"{act} act_{number} = Identity (act)"
            continue
        branch = (
            f"number_{number} = Constant <value_int = {number}> () is_{number} = Equal (wanted, number_{number}) "
            f"act_{number} = If (is_{number}) <then_branch = then_{number} () => (act) {{ {act} }}, "
            f"else_branch = else_{number} () => (act_{number + 1}) {{ {branch} }}>"
        )
    return f"{_LINEAR}\n  {branch}\n  y = Identity (act_0)\n"


_LINEAR = f"""
  last = Constant <value_ints = [-1]> ()
  first = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  nothing = Constant <value_float = 0.0> ()
  levels = Constant <value_float = {LEVELS}.0> ()
  tiny = Constant <value_float = 7.8886090522101181e-31> ()
  wanted = Constant <value_int: int = @activation> ()

  low_all = ReduceMin <keepdims = 1> (x, last)
  row_low = Slice (low_all, first, one, last)
  high_all = ReduceMax <keepdims = 1> (x, last)
  row_high = Slice (high_all, first, one, last)
  low = Min (row_low, nothing)
  high = Max (row_high, nothing)
  exact_range = Sub (high, low)
  range = Max (exact_range, tiny)
  inverse = Div (levels, range)
  below = Neg (low)
  below_steps = Mul (below, inverse)
  zero = Round (below_steps)
  steps = Mul (x, inverse)
  nearest = Round (steps)
  shifted = Add (nearest, zero)
  bounded = Clip (shifted, nothing, levels)
  q = Cast <to = 2> (bounded)

  w = Cast <to = 6> (weight)
  middle = Constant <value = int32 {{128}}> ()
  w_shifted = Add (w, middle)
  w_unsigned = Cast <to = 2> (w_shifted)
  q_zero = Constant <value = uint8 {{0}}> ()
  w_zero = Constant <value = uint8 {{128}}> ()
  products = MatMulInteger (q, w_unsigned, q_zero, w_zero)
  w_sums = ReduceSum <keepdims = 0> (w, first)
  zero_i = Cast <to = 6> (zero)
  of_zero = Mul (zero_i, w_sums)
  exact = Sub (products, of_zero)

  scale = Div (range, levels)
  scales = Mul (scale, weight_scale)
  sums = Cast <to = 1> (exact)
  scaled = Mul (sums, scales)
  biased = Add (scaled, bias)
  x_nothing = Mul (x, nothing)
  nothing_all = ReduceSum <keepdims = 1> (x_nothing, last)
  row_nothing = Slice (nothing_all, first, one, last)
  range_nothing = Mul (range, nothing)
  spoilt = Add (row_nothing, range_nothing)
  sum = Add (biased, spoilt)
"""
"""Sums are those of integers, and exact: as products of unsigned bytes, since those of mixed signs saturate in ONNX
Runtime on x86 without VNNI. What is not finite makes its row NaN: `spoilt` is 0 elsewhere. The slices are for 0 rows,
of which ONNX Runtime (1.31) reduces no axis."""


INT8_LINEAR = Op(
    "Int8Linear",
    doc="act(x W + bias), with x rounded to 255 steps from each row's least to its greatest value, one of which is 0, "
    "half to even. Sums of integers are exact. A row with values that are not finite becomes NaN.",
    inputs=(
        Input("x", _FLOAT, "[..., in_features]"),
        Input("weight", _INT8, "[in_features, out_features], in_features at most 65536"),
        Input("weight_scale", _FLOAT, "[out_features]"),
        Input("bias", _FLOAT, "[out_features]"),
    ),
    outputs=(Output("y", "x", "[..., out_features]", _infer),),
    attributes=(Attribute("activation", 0, f"a number: {', '.join(f'{n} {name}' for name, n in NUMBERS.items())}"),),
    body=_body,
)
