"""KeepTokens: which tokens of a packed batch go on to the next layer.

Learned token pruning (LTP, arXiv 2107.00910) keeps tokens whose importance, the attention that they receive, reaches a
threshold; Magic Pyramid (arXiv 2111.00230) prunes so. `mode` "ratio" keeps a share of each sample instead.

There is no GPU kernel: the rows that a sample keeps follow those of all samples before it, and the programs of one
launch cannot wait for each other's counts. On a GPU the reference body runs; TensorRT's parser takes its ops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.plugins.dialect import FLOAT, INT32, Attribute, Form, Input, Op, Output, Value
from trimtab.plugins.rows import CONSTANTS, places_of
from trimtab.plugins.sizes import Counted, Shapes, Size

__all__ = ["KEEP_TOKENS"]

LEAST = 2
"""Tokens of a sample that stay at least, if it has as many."""


def _kept(shapes: Shapes, attributes: Mapping[str, Value]) -> list[Any]:
    importance = shapes["importance"]
    return [Counted("kept", Size() if importance is None else importance[0])]


def _offsets(shapes: Shapes, attributes: Mapping[str, Value]) -> list[Any] | None:
    offsets = shapes["offsets"]
    return None if offsets is None else [*offsets]


def _body(form: Form) -> str:
    choice = _RATIO if form.attributes["mode"] == "ratio" else _THRESHOLD
    return "\n".join([CONSTANTS, _SAMPLES, choice, _FLAGS, places_of("flags", "tokens", "kept"), _OFFSETS])


# Samples are the rows of a matrix [batch + 1, T + LEAST], where tokens of other samples and the padding are -inf. The
# last is a sample without tokens, so that there is one: before 1.31 ONNX Runtime's TopK of 0 rows ended the process.
# No op reduces: ONNX Runtime 1.31 returns wrong shapes for 0 rows.
_SAMPLES = f"""
  least = Constant <value = int64[1] {{{LEAST}}}> ()
  padding = Constant <value = float[{LEAST}] {{{", ".join(["0"] * LEAST)}}}> ()
  nothing = Constant <value = float[1] {{0}}> ()
  off = Constant <value = float {{0}}> ()
  inf = Constant <value = float {{inf}}> ()
  outside = Constant <value = float {{-inf}}> ()
  lowest = Constant <value = float {{-3.4028234663852886e38}}> ()

  all = Cast <to = 7> (offsets)
  tokens = Shape (importance)
  some_ends = Slice (all, one, end, none)
  last = Slice (all, minus, end, none)
  ends_ = Concat <axis = 0> (some_ends, last)
  starts = Unsqueeze (all, one)
  ends = Unsqueeze (ends_, one)
  tokens_ = Squeeze (tokens)
  wide = Add (tokens, least)
  wide_ = Squeeze (wide)
  at = Range (zero, wide_, step)
  behind = GreaterOrEqual (at, starts)
  before = Less (at, ends)
  inside = And (behind, before)

  is_nan = IsNaN (importance)
  no_nan = Where (is_nan, inf, importance)
  bounded = Max (no_nan, lowest)
  padded = Concat <axis = 0> (bounded, padding)
  first_ = Constant <value_int: int = @first> ()
  is_first = Equal (at, starts)
  protect = Equal (first_, step)
  protected = And (is_first, protect)
  keys = Where (protected, inf, padded)
  rows = Where (inside, keys, outside)

  batch = Shape (some_ends)
  dial_flat = Reshape (threshold, minus)
  dial_some = Expand (dial_flat, batch)
  dial_all = Concat <axis = 0> (dial_some, nothing)
  dials = Unsqueeze (dial_all, one)
"""

# Tokens that reach the threshold, and the LEAST highest. `places` are tokens to keep; T stands for none.
_THRESHOLD = """
  under = Less (rows, dials)
  strict = Greater (dials, off)
  drop = And (under, strict)
  reach_ = Not (drop)
  reach = And (inside, reach_)
  reached = Where (reach, at, tokens)
  values, best = TopK <axis = -1> (rows, least)
  real = GreaterOrEqual (values, lowest)
  best_ = Where (real, best, tokens)
  reached_flat = Reshape (reached, minus)
  best_flat = Reshape (best_, minus)
  places = Concat <axis = 0> (reached_flat, best_flat)
"""

# The max(min(LEAST, n), ceil(share * n)) highest of the n tokens of a sample.
_RATIO = """
  n_ = Sub (ends, starts)
  n = Cast <to = 1> (n_)
  share_nan = IsNaN (dials)
  full = Constant <value = float {1}> ()
  share = Where (share_nan, full, dials)
  part = Mul (share, n)
  part_up = Ceil (part)
  least_f = Cast <to = 1> (least)
  at_least = Min (least_f, n)
  k = Max (part_up, at_least)
  values, best = TopK <axis = -1> (rows, wide)
  at_f = Cast <to = 1> (at)
  within = Less (at_f, k)
  real_ = GreaterOrEqual (values, lowest)
  real = And (within, real_)
  best_ = Where (real, best, tokens)
  places = Reshape (best_, minus)
"""

# flags [T]: 1 for the tokens in `places`. One more slot takes what is not kept.
_FLAGS = """
  slots = Add (tokens, one)
  flags_none = ConstantOfShape <value = int64[1] {0}> (slots)
  places_shape = Shape (places)
  ones = ConstantOfShape <value = int64[1] {1}> (places_shape)
  flags_all = ScatterElements <axis = 0> (flags_none, places, ones)
  flags = Slice (flags_all, none, tokens, none)"""

_OFFSETS = """
  new_offsets = Gather <axis = 0> (kept_p_counts, all)
  offsets_out = Cast <to = 6> (new_offsets)
"""


KEEP_TOKENS = Op(
    "KeepTokens",
    doc="The rows of a packed batch that stay. Threshold: those whose importance is not below it, or all where it is "
    "0, less or NaN. Ratio: the ceil(share * n) most important of the n rows of a sample, the earlier of equal ones. "
    f"The {LEAST} most important rows of a sample always stay. NaN counts as infinite: no threshold drops it.",
    inputs=(
        Input("importance", FLOAT, "[T], of the tokens of all samples, one sample behind the other"),
        Input("offsets", INT32, "[batch + 1], sample b has the rows from offsets[b] to offsets[b + 1]; the last is T"),
        Input("threshold", FLOAT, "the threshold or share: one for all, [] or [1], or one for each sample, [batch]"),
    ),
    outputs=(
        Output("kept", "tensor(int32)", "[kept], numbers of the rows that stay, ascending", _kept),
        Output("offsets_out", "tensor(int32)", "[batch + 1], where each sample begins among those", _offsets),
    ),
    attributes=(
        Attribute("mode", "threshold", "what `threshold` is", ("threshold", "ratio")),
        Attribute("first", 1, "1: the first row of a sample is more important than its others, and stays"),
    ),
    body=_body,
)
