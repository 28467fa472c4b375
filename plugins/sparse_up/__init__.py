"""SparseUp: the activations of the chosen blocks of an FFN's neurons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.plugins.dialect import ACTIVATION, INT32, WEIGHTS, Attribute, Form, Input, Op, Output, Value
from trimtab.plugins.rows import chosen_rows, in_float, numbers_of_rows, shaped
from trimtab.plugins.sizes import Shapes, Size

__all__ = ["ACTIVATIONS", "SPARSE_UP"]

ACTIVATIONS = {
    "identity": ("act = Identity ({x})",),
    "relu": ("act = Relu ({x})",),
    "relu_squared": ("act_r = Relu ({x})", "act = Mul (act_r, act_r)"),
    "silu": ("act_s = Sigmoid ({x})", "act = Mul ({x}, act_s)"),
    "gelu": (
        "act_a = Constant <value_float = 0.70710678> ()", "act_half = Constant <value_float = 0.5> ()",
        "act_u = Mul ({x}, act_a)", "act_e = Erf (act_u)", "act_f = Mul (act_e, act_half)",
        "act_g = Add (act_f, act_half)", "act = Mul ({x}, act_g)",
    ),
    "gelu_tanh": (
        "act_a = Constant <value_float = 0.79788456> ()", "act_b = Constant <value_float = 0.035677408> ()",
        "act_half = Constant <value_float = 0.5> ()", "act_q = Mul ({x}, {x})", "act_bq = Mul (act_b, act_q)",
        "act_abq = Add (act_a, act_bq)", "act_u = Mul ({x}, act_abq)", "act_e = Tanh (act_u)",
        "act_f = Mul (act_e, act_half)", "act_g = Add (act_f, act_half)", "act = Mul ({x}, act_g)",
    ),
    "quick_gelu": (
        "act_c = Constant <value_float = 1.702> ()", "act_m = Mul ({x}, act_c)", "act_s = Sigmoid (act_m)",
        "act = Mul ({x}, act_s)",
    ),
    "sigmoid": ("act = Sigmoid ({x})",),
    "tanh": ("act = Tanh ({x})",),
}  # fmt: skip
"""Name, as `trimtab.passes.anatomy` gives it → the statements that compute `act` of `{x}`."""


def infer_chosen(shapes: Shapes, attributes: Mapping[str, Value]) -> list[Any] | None:
    """x [..., width] and blocks [tokens or 1, k] → [..., k · block]."""
    x, blocks = shapes["x"], shapes["blocks"]
    if x is None:
        return None
    return [*x[:-1], (Size() if blocks is None else blocks[1]) * int(attributes.get("block", 1))]


def _body(form: Form) -> str:
    gated = "gate" in form.given
    lines = [numbers_of_rows(form), *products(form, "up")]
    if gated:
        lines += products(form, "gate")
    activation = ACTIVATIONS[str(form.attributes["activation"])]
    lines += ["  " + line.format(x="gate_y" if gated else "up_y") for line in activation]
    name = "all_" if "importance" in form.given else "h_"
    lines.append("  every = Mul (act, up_y)" if gated else "  every = Identity (act)")
    lines += ["  nothing = Constant <value_float = 0.0> ()", f"  {name} = Where (taken, every, nothing)"]
    if "importance" in form.given:
        lines.append(kept(form))
    return "\n".join([*lines, *shaped(form, "x", "h", "rows")])


def kept(form: Form) -> str:
    """Statements that make `h_` of `all_`, [tokens, 1, n]: 0 for all but the blocks of largest Σ |h| · importance."""
    of_rows = in_float(form, "importance", "importance", "of_rows", "Gather ({}, rows)")
    return _KEEP.replace("$of_rows", "\n".join(of_rows))


_KEEP = """
  first = Constant <value_ints = [0]> ()
  three = Constant <value_ints = [3]> ()
  keep_ = Constant <value_int: int = @keep> ()
  there = Shape <start = 1> (blocks)
  of_block = Reshape (block_, minus)
  block_column = Concat <axis = 0> (of_block, one)
  ones_block = ConstantOfShape <value = float[1] {1}> (block_column)
$of_rows
  of_each = Unsqueeze (of_rows, one)
  sizes = Abs (all_)
  adds = Mul (sizes, of_each)
  blocks_shape = Concat <axis = 0> (first, first, there, of_block)
  in_blocks = Reshape (adds, blocks_shape)
  sums = MatMul (in_blocks, ones_block)
  scores_own = Squeeze (sums, three)
  row_shape = Concat <axis = 0> (one, one, there)
  row = ConstantOfShape <value = float[1] {0}> (row_shape)
  scores = Concat <axis = 0> (scores_own, row)
  asked = Reshape (keep_, minus)
  some = Greater (asked, first)
  fewer = Min (asked, there)
  kept = Where (some, fewer, there)
  values, best = TopK <axis = -1> (scores, kept)
  none_shape = Shape (scores)
  none = ConstantOfShape <value = float[1] {0}> (none_shape)
  one_shape = Shape (best)
  ones = ConstantOfShape <value = float[1] {1}> (one_shape)
  mask_more = ScatterElements <axis = -1> (none, best, ones)
  mask_ = Slice (mask_more, first, minus, first)
  mask = Unsqueeze (mask_, minus)
  all_blocks = Reshape (all_, blocks_shape)
  masked = Mul (all_blocks, mask)
  back = Shape (all_)
  h_ = Reshape (masked, back)"""
"""For 0 rows: no op reduces, which ONNX Runtime 1.31 gets wrong, and TopK has one row more, since that of no rows ends
the process before 1.31."""


def products(form: Form, label: str) -> list[str]:
    """Statements that compute `<label>_y`, [tokens, 1, rows], of x with the chosen rows of the weights `label`."""
    lines = [
        chosen_rows(form, label),
        f"  {label}_t = Transpose <perm = [0, 2, 1]> ({label}_rows)",
        f"  {label}_p = MatMul (flat, {label}_t)",
    ]
    if f"{label}_bias" not in form.given:
        return [*lines, f"  {label}_y = Identity ({label}_p)"]
    return [
        *lines,
        *in_float(form, f"{label}_bias", f"{label}_bias", f"{label}_b", "Gather ({}, rows)"),
        f"  {label}_c = Unsqueeze ({label}_b, one)",
        f"  {label}_y = Add ({label}_p, {label}_c)",
    ]


SPARSE_UP = Op(
    "SparseUp",
    doc="act(x gateᵀ + gate_bias) * (x upᵀ + up_bias), or act(x upᵀ + up_bias), for the chosen blocks alone. "
    "Kernels may round x to 16 bits per 512 of a row where weights are integers, and to bytes per 1024 where they are "
    "int8 and several tokens take a block.",
    inputs=(
        Input("x", ACTIVATION, "[..., width]"),
        Input("blocks", INT32, "[tokens, k], or [1, k] for all tokens; with at_most, -1 is none", role="choice"),
        Input(
            "up",
            WEIGHTS,
            "[neurons, width]; int4 as uint8 [neurons, width / 2], the first in the low half, zero at 8",
            role="rows",
        ),
        Input(
            "up_scale",
            ACTIVATION,
            "of integer weights: [neurons] for int8, [neurons, width / 32] for int4",
            optional=True,
            role="rows",
        ),
        Input("up_bias", ACTIVATION, "[neurons]", optional=True, role="rows"),
        Input("gate", WEIGHTS, "as up", optional=True, role="rows"),
        Input("gate_scale", ACTIVATION, "as up_scale", optional=True, role="rows"),
        Input("gate_bias", ACTIVATION, "[neurons]", optional=True, role="rows"),
        Input(
            "importance",
            ACTIVATION,
            "[neurons]: what one unit of a neuron's activation counts, for `keep`",
            optional=True,
            role="rows",
        ),
    ),
    outputs=(Output("h", "x", "[..., k · block], of the chosen neurons in order; 0 for a block -1", infer_chosen),),
    attributes=(
        Attribute(
            "activation", "identity", "what goes around x gateᵀ, or x upᵀ where there is no gate", tuple(ACTIVATIONS)
        ),
        Attribute("block", 1, "neurons in a block"),
        Attribute("at_most", 0, "1: blocks may be -1, at the end; 0: each is one"),
        Attribute("keep", 0, "blocks that are not set to 0, those of the largest Σ |h| · importance; 0: all of them"),
    ),
    body=_body,
    across_ranks="concat",
)
