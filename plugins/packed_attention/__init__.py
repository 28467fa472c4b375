"""PackedAttention: attention within each sample of a batch whose real tokens are packed one behind the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.plugins.dialect import ACTIVATION, FLOAT, INT32, Attribute, Form, Input, Op, Output, Value
from trimtab.plugins.rows import as_input, in_float
from trimtab.plugins.sizes import Shapes

__all__ = ["PACKED_ATTENTION"]


def _context_shape(shapes: Shapes, attributes: Mapping[str, Value]) -> list[Any] | None:
    q = shapes["q"]
    if q is None:
        return None
    if shapes.get("k") is not None or shapes.get("v") is not None:
        return list(q)
    heads, kv_heads = int(attributes["heads"]), int(attributes["kv_heads"])
    return [q[0], q[1] // (heads + 2 * (kv_heads or heads)) * heads]


def _body(form: Form) -> str:
    return "\n".join([_SAMPLES, *_operands(form), *_scores(form), _WEIGHTS, *_context(form), _RECEIVED])


def body_of_rows(form: Form) -> str:
    """Of `context` and the log-sum-exp of each query, [tokens, heads]."""
    return "\n".join([_SAMPLES, *_operands(form), *_scores(form), _WEIGHTS, *_context(form), _SUMS])


def body_of_received(form: Form) -> str:
    """Of `received`, given the log-sum-exp of each query."""
    return "\n".join([_SAMPLES, *_operands(form), *_scores(form), _WEIGHTS_OF_SUMS, _RECEIVED])


# Samples get one without tokens, and each `longest` >= 1 places, so that no tensor on the way is empty. Where there are
# no tokens, the first place attends to itself, so that nothing is NaN.
_SAMPLES = """
  zero = Constant <value_int = 0> ()
  step = Constant <value_int = 1> ()
  first = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  two = Constant <value_ints = [2]> ()
  minus = Constant <value_ints = [-1]> ()
  end = Constant <value_ints = [9223372036854775807]> ()
  heads_ = Constant <value_int: int = @heads> ()
  kv_heads_ = Constant <value_int: int = @kv_heads> ()
  alike = Equal (kv_heads_, zero)
  kv_heads__ = Where (alike, heads_, kv_heads_)
  h = Reshape (heads_, one)
  c = Reshape (kv_heads__, one)
  g = Div (h, c)
  wide = Cast <to = 7> (offsets)
  some_starts = Slice (wide, first, minus)
  some_ends = Slice (wide, one, end)
  some_lengths = Sub (some_ends, some_starts)
  starts = Concat <axis = 0> (some_starts, first)
  lengths = Concat <axis = 0> (some_lengths, first)
  at_least = Concat <axis = 0> (lengths, one)
  longest = ReduceMax <keepdims = 1> (at_least)
  longest_ = Squeeze (longest)
  places = Range (zero, longest_, step)
  starts_ = Unsqueeze (starts, one)
  lengths_ = Unsqueeze (lengths, one)
  real = Less (places, lengths_)
  keys_ = Max (lengths_, one)
  attended = Less (places, keys_)
  all_rows = Add (starts_, places)
  tokens = Shape <start = 0, end = 1> (q)
  rows = Where (real, all_rows, tokens)
  batch = Shape <start = 0, end = 1> (rows)
  lead = Concat <axis = 0> (batch, longest)
  flat_rows = Reshape (rows, minus)
  slots = Add (tokens, one)
  unset = ConstantOfShape <value = int64[1] {0}> (slots)
  many = Mul (batch, longest)
  many_ = Squeeze (many)
  own = Range (zero, many_, step)
  placed = ScatterElements <axis = 0> (unset, flat_rows, own)
  place_of_row = Slice (placed, first, tokens, first)"""


def _operands(form: Form) -> list[str]:
    """Makes q5 [batch, kv_heads, group, longest, dim], scaled, k5 [.., 1, dim, longest], v5 [.., 1, longest, dim].

    Without v5, where k is given and v is not.
    """
    packed = "k" not in form.given
    lines = [line for name in ("q", "k", "v") if name in form.given for line in _gathered(form, name)]
    if packed:
        lines += [
            "  q_width = Shape <start = -1> (q)",
            "  c2 = Mul (c, two)",
            "  parts = Add (h, c2)",
            "  dim = Div (q_width, parts)",
            "  of_queries = Mul (h, dim)",
            "  of_keys = Mul (c, dim)",
            "  sizes = Concat <axis = 0> (of_queries, of_keys, of_keys)",
            "  queries, keys, values = Split <axis = 2> (q_g, sizes)",
        ]
    else:
        lines += [
            "  of_queries = Shape <start = -1> (q)",
            "  dim = Div (of_queries, h)",
            "  queries = Identity (q_g)",
            "  keys = Identity (k_g)",
        ]
    lines += [
        "  q_shape = Concat <axis = 0> (lead, c, g, dim)",
        "  kv_shape = Concat <axis = 0> (lead, c, one, dim)",
        "  q_4 = Reshape (queries, q_shape)",
        "  k_4 = Reshape (keys, kv_shape)",
        "  q_5 = Transpose <perm = [0, 2, 3, 1, 4]> (q_4)",
        "  k5 = Transpose <perm = [0, 2, 3, 4, 1]> (k_4)",
    ]
    if packed or "v" in form.given:
        lines += [
            f"  v_4 = Reshape ({'values' if packed else 'v_g'}, kv_shape)",
            "  v5 = Transpose <perm = [0, 2, 3, 1, 4]> (v_4)",
        ]
    if "scale" in form.given:
        return [*lines, "  q5 = Mul (q_5, scale)"]
    return [*lines, "  size = Cast <to = 1> (dim)", "  root = Sqrt (size)", "  q5 = Div (q_5, root)"]


def _gathered(form: Form, name: str) -> list[str]:
    """Makes `<name>_g` [batch, longest, width]; places without a token are zeros."""
    return [
        *in_float(form, name, name, f"{name}_f", "Identity ({})"),
        f"  {name}_size = Shape <start = -1> ({name})",
        f"  {name}_row = Concat <axis = 0> (one, {name}_size)",
        f"  {name}_zeros = ConstantOfShape <value = float[1] {{0.0}}> ({name}_row)",
        f"  {name}_all = Concat <axis = 0> ({name}_f, {name}_zeros)",
        f"  {name}_g = Gather <axis = 0> ({name}_all, rows)",
    ]


def _scores(form: Form) -> list[str]:
    """Makes `masked` [batch, kv_heads, group, longest, longest], -inf for keys that a sample does not have."""
    lines = ["  products = MatMul (q5, k5)"]
    if "bias" in form.given:
        lines += [
            *in_float(form, "bias", "bias", "bias_f", "Identity ({})"),
            "  last_axes = Constant <value_ints = [-2, -1]> ()",
            "  pads = Constant <value_ints = [0, 0, 1, 1]> ()",
            "  nothing = Constant <value = float {0.0}> ()",
            "  bias_larger = Pad (bias_f, pads, nothing, last_axes)",
            "  none = Constant <value_ints = [0, 0]> ()",
            "  square = Concat <axis = 0> (longest, longest)",
            "  bias_cut = Slice (bias_larger, none, square, last_axes)",
            "  bias_flat = Concat <axis = 0> (minus, square)",
            "  bias_3 = Reshape (bias_cut, bias_flat)",
            "  bias_heads = Concat <axis = 0> (h, square)",
            "  bias_all = Expand (bias_3, bias_heads)",
            "  bias_groups = Concat <axis = 0> (c, g, square)",
            "  bias_4 = Reshape (bias_all, bias_groups)",
            "  scores = Add (products, bias_4)",
        ]
    else:
        lines += ["  scores = Identity (products)"]
    return [
        *lines,
        "  key_axes = Constant <value_ints = [1, 2, 3]> ()",
        "  real_keys = Unsqueeze (attended, key_axes)",
        "  never = Constant <value = float {-inf}> ()",
        "  masked = Where (real_keys, scores, never)",
    ]


def _context(form: Form) -> list[str]:
    return [
        "  mixed = MatMul (weights, v5)",
        "  by_token = Transpose <perm = [0, 3, 1, 2, 4]> (mixed)",
        "  width = Mul (h, dim)",
        "  context_shape = Concat <axis = 0> (minus, width)",
        "  by_place = Reshape (by_token, context_shape)",
        *as_input(form, "q", "context", "Gather <axis = 0> (by_place, place_of_row)"),
    ]


_WEIGHTS = """
  weights = Softmax <axis = -1> (masked)"""

# A maximum of -inf, where a bias hides all keys, makes it -inf - (-inf): NaN, as Softmax has it.
_SUMS = """
  last_axis = Constant <value_ints = [-1]> ()
  largest = ReduceMax <keepdims = 1> (masked, last_axis)
  smaller = Sub (masked, largest)
  powers = Exp (smaller)
  totals = ReduceSum <keepdims = 1> (powers, last_axis)
  logarithms = Log (totals)
  all_sums = Add (largest, logarithms)
  sums_by_token = Transpose <perm = [0, 3, 1, 2, 4]> (all_sums)
  sums_shape = Concat <axis = 0> (minus, h)
  sums_by_place = Reshape (sums_by_token, sums_shape)
  log_sum_exp = Gather <axis = 0> (sums_by_place, place_of_row)"""

_WEIGHTS_OF_SUMS = """
  sums_row = Concat <axis = 0> (one, h)
  sums_zeros = ConstantOfShape <value = float[1] {0.0}> (sums_row)
  sums_all = Concat <axis = 0> (log_sum_exp, sums_zeros)
  sums_g = Gather <axis = 0> (sums_all, rows)
  sums_shape = Concat <axis = 0> (lead, c, g, one)
  sums_5 = Reshape (sums_g, sums_shape)
  bases = Transpose <perm = [0, 2, 3, 1, 4]> (sums_5)
  logarithms = Sub (masked, bases)
  weights = Exp (logarithms)"""

_RECEIVED = """
  query_axes = Constant <value_ints = [1, 2, 4]> ()
  real_queries = Unsqueeze (real, query_axes)
  no_weight = Constant <value = float {0.0}> ()
  real_weights = Where (real_queries, weights, no_weight)
  other_axes = Constant <value_ints = [1, 2, 3]> ()
  sums = ReduceSum <keepdims = 0> (real_weights, other_axes)
  queries_of = Mul (keys_, h)
  queries_f = Cast <to = 1> (queries_of)
  means = Div (sums, queries_f)
  flat_means = Reshape (means, minus)
  received = Gather <axis = 0> (flat_means, place_of_row)"""


PACKED_ATTENTION = Op(
    "PackedAttention",
    doc="softmax(scale q kᵀ + bias) v of every head within each sample: every token attends to all tokens of its own.",
    inputs=(
        Input("q", ACTIVATION, "[tokens, heads · dim]; without k and v [tokens, (heads + 2 kv_heads) · dim]: q, k, v"),
        Input("k", ACTIVATION, "[tokens, kv_heads · dim]", optional=True),
        Input("v", ACTIVATION, "[tokens, kv_heads · dim]", optional=True),
        Input("offsets", INT32, "[batch + 1], ascending from 0: sample b is the rows offsets[b] to offsets[b + 1]"),
        Input(
            "bias",
            ACTIVATION,
            "[size, size], [1 or heads, size, size] or [1, 1 or heads, size, size], by positions of query and key "
            "within their sample; size is at least the length of the longest",
            optional=True,
        ),
        Input("scale", FLOAT, "[]; 1 / √dim where it is left out", optional=True),
    ),
    outputs=(
        Output("context", "q", "[tokens, heads · dim]", _context_shape),
        Output(
            "received",
            "tensor(float)",
            "[tokens]: attention that a token receives, the mean over the heads and the queries of its sample",
            lambda shapes, _: None if shapes["q"] is None else [shapes["q"][0]],
            optional=True,
        ),
    ),
    attributes=(
        Attribute("heads", 1, "of queries"),
        Attribute("kv_heads", 0, "of keys and values; divides heads; 0: as many as heads"),
    ),
    body=_body,
)
