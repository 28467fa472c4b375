"""Statements of ONNX's text form that reference bodies of several ops share."""

from __future__ import annotations

from trimtab.plugins.dialect import FLOAT, Form

_ONNX = {"tensor(float16)": 10, "tensor(bfloat16)": 16}
"""ONNX's numbers of the types that are cast to float and back."""


CONSTANTS = """
  zero = Constant <value_int = 0> ()
  step = Constant <value_int = 1> ()
  one = Constant <value_ints = [1]> ()
  none = Constant <value_ints = [0]> ()
  minus = Constant <value_ints = [-1]> ()
  end = Constant <value_ints = [9223372036854775807]> ()"""
"""Constants for statements about packed batches."""

BOUNDS = """
  all = Cast <to = 7> (offsets)
  starts = Slice (all, none, minus, none)
  ends = Slice (all, one, end, none)
  starts_ = Unsqueeze (starts, one)
  tokens = Shape <start = 0, end = 1> (x)
  tokens_ = Squeeze (tokens)
  at = Range (zero, tokens_, step)"""
"""Makes `starts` and `ends` [batch] of the samples of a packed batch, `starts_` [batch, 1], and `at` [T], the numbers
of all rows of `x`. It reads `CONSTANTS`."""

MEMBERS = """
  behind = GreaterOrEqual (at, starts_)
  before = Less (at, ends_)
  inside = And (behind, before)
  belongs = Cast <to = 1> (inside)"""
"""Makes `belongs` [batch, T], float: 1 for the rows of each sample from `starts_` up to `ends_` [batch, 1]. It reads
`BOUNDS`."""


def in_float(form: Form, name: str, source: str, result: str, op: str) -> list[str]:
    """Statements that make `result` = `op`, in float: `op` reads `source`, which is of the type of the input `name`."""
    if form.given.get(name, FLOAT[0]) in FLOAT:
        return [f"  {result} = {op.format(source)}"]
    return [f"  {result}_n = {op.format(source)}", f"  {result} = Cast <to = 1> ({result}_n)"]


def size_of(form: Form, name: str, result: str) -> str:
    """Statements that make `result`, how many numbers the input `name` has. ONNX Runtime lacks Size of bfloat16."""
    return "\n".join([*in_float(form, name, name, f"{result}_of", "Identity ({})"), f"  {result} = Size ({result}_of)"])


def as_input(form: Form, name: str, result: str, op: str) -> list[str]:
    """Statements that make `result` = `op`, of what is in float, in the type of the input `name`."""
    if form.given[name] in FLOAT:
        return [f"  {result} = {op}"]
    return [f"  {result}_f = {op}", f"  {result} = Cast <to = {_ONNX[form.given[name]]}> ({result}_f)"]


def numbers_of_rows(form: Form, x: str = "x", block: str = "@block") -> str:
    """Makes `rows` [tokens or 1, n], the numbers of the neurons in `blocks`, and `flat` [tokens, 1, width] of x.

    Of a block -1 the rows are those of block 0, and `taken` [tokens or 1, 1, n] is false. Both have one row where there
    are no tokens, since not all runtimes compute with nothing; `tokens` [1] is how many there are.
    """
    size = f"value_int: int = {block}" if block.startswith("@") else f"value_int = {block}"
    flat = "\n".join(in_float(form, x, x, "flat_", "Reshape <allowzero = 1> ({}, flat_shape)"))
    return f"""
  zero = Constant <value_int = 0> ()
  step = Constant <value_int = 1> ()
  one = Constant <value_ints = [1]> ()
  minus = Constant <value_ints = [-1]> ()
  two = Constant <value_ints = [2]> ()
  block_ = Constant <{size}> ()
  wide = Cast <to = 7> (blocks)
  groups_k = Shape (blocks)
  groups_ = Gather (groups_k, zero)
  groups_some = Min (groups_, one)
  groups_none = Sub (one, groups_some)
  k_ = Shape <start = 1> (blocks)
  more_shape = Concat <axis = 0> (groups_none, k_)
  more = ConstantOfShape <value = int64[1] {{0}}> (more_shape)
  numbers = Concat <axis = 0> (wide, more)
  is_block = GreaterOrEqual (numbers, zero)
  or_first = Max (numbers, zero)
  starts = Mul (or_first, block_)
  starts_ = Unsqueeze (starts, two)
  within = Range (zero, block_, step)
  each = Add (starts_, within)
  is_block_ = Unsqueeze (is_block, two)
  is_within = GreaterOrEqual (within, zero)
  is_taken = And (is_block_, is_within)
  groups = Add (groups_, groups_none)
  n_ = Mul (k_, block_)
  rows_shape = Concat <axis = 0> (groups, n_)
  rows = Reshape <allowzero = 1> (each, rows_shape)
  taken_ = Reshape <allowzero = 1> (is_taken, rows_shape)
  taken = Unsqueeze (taken_, one)
  width = Shape <start = -1> ({x})
{size_of(form, x, "size_x")}
  tokens = Div (size_x, width)
  flat_shape = Concat <axis = 0> (tokens, one, width)
{flat}
  tokens_some = Min (tokens, one)
  tokens_none = Sub (one, tokens_some)
  filler_shape = Concat <axis = 0> (tokens_none, one, width)
  filler = ConstantOfShape <value = float[1] {{0}}> (filler_shape)
  flat = Concat <axis = 0> (flat_, filler)"""


def shaped(form: Form, x: str, name: str, width: str) -> list[str]:
    """Statements that bring `<name>_`, [tokens, 1, n], into the leading sizes and the type of x.

    Args:
        width: what gives the last size, as its own last size.
    """
    return [
        "  begin = Constant <value_ints = [0]> ()",
        f"  {name}_there = Slice ({name}_, begin, tokens, begin)",
        f"  lead = Shape <end = -1> ({x})",
        f"  size = Shape <start = -1> ({width})",
        "  shape = Concat <axis = 0> (lead, size)",
        *as_input(form, x, name, f"Reshape <allowzero = 1> ({name}_there, shape)"),
    ]


def chosen_rows(form: Form, label: str) -> str:
    """Makes `<label>_rows` [tokens or 1, n, width] in float: the chosen rows of the weights `label`."""
    kind = form.given[label]
    lines = [f"  {label}_g = Gather ({label}, rows)"]
    if kind == "tensor(uint8)":
        return "\n".join([*lines, *_int4(form, label)])
    if kind != "tensor(int8)":
        return "\n".join([*lines, f"  {label}_rows = Cast <to = 1> ({label}_g)"])
    return "\n".join(
        [
            *lines,
            f"  {label}_i = Cast <to = 1> ({label}_g)",
            *in_float(form, f"{label}_scale", f"{label}_scale", f"{label}_s", "Gather ({}, rows)"),
            f"  {label}_s1 = Unsqueeze ({label}_s, two)",
            f"  {label}_rows = Mul ({label}_i, {label}_s1)",
        ]
    )


def _int4(form: Form, label: str) -> list[str]:
    return [
        f"  {label}_w = Cast <to = 6> ({label}_g)",  # runtimes lack bit operations on some types; int32 has Div and Mod
        f"  {label}_16 = Constant <value = int32 {{16}}> ()",
        f"  {label}_8 = Constant <value = float {{8.0}}> ()",
        f"  {label}_3 = Constant <value_ints = [3]> ()",
        f"  {label}_0 = Mod ({label}_w, {label}_16)",
        f"  {label}_1 = Div ({label}_w, {label}_16)",
        f"  {label}_0u = Unsqueeze ({label}_0, {label}_3)",
        f"  {label}_1u = Unsqueeze ({label}_1, {label}_3)",
        f"  {label}_both = Concat <axis = -1> ({label}_0u, {label}_1u)",
        f"  {label}_int = Cast <to = 1> ({label}_both)",
        f"  {label}_centred = Sub ({label}_int, {label}_8)",
        *in_float(form, f"{label}_scale", f"{label}_scale", f"{label}_s", "Gather ({}, rows)"),
        f"  {label}_lead = Shape ({label}_s)",
        f"  {label}_32 = Constant <value_ints = [32]> ()",
        f"  {label}_blocks = Concat <axis = 0> ({label}_lead, {label}_32)",
        f"  {label}_in = Reshape ({label}_centred, {label}_blocks)",
        f"  {label}_s3 = Unsqueeze ({label}_s, {label}_3)",
        f"  {label}_out = Mul ({label}_in, {label}_s3)",
        f"  {label}_first = Shape <end = 2> ({label}_s)",
        f"  {label}_bytes = Shape <start = -1> ({label}_g)",
        f"  {label}_width = Mul ({label}_bytes, two)",
        f"  {label}_flat = Concat <axis = 0> ({label}_first, {label}_width)",
        f"  {label}_rows = Reshape ({label}_out, {label}_flat)",
    ]


def places_of(flags: str, count: str, result: str) -> str:
    """Makes `result`, int32: where `flags` [count] is 1, in ascending order. Running sums are the new places.

    It reads `CONSTANTS`. It also makes `<result>_p_counts` [count + 1], how many came before, and `<result>_l`,
    `result` in int64.
    """
    p = f"{result}_p"
    return f"""
  {p}_sums = CumSum ({flags}, zero)
  {p}_counts = Concat <axis = 0> (none, {p}_sums)
  {p}_count = Slice ({p}_counts, minus, end, none)
  {p}_new = Slice ({p}_counts, none, minus, none)
  {p}_is = Cast <to = 9> ({flags})
  {p}_to = Where ({p}_is, {p}_new, {count})
  {p}_number = Squeeze ({count})
  {p}_own = Range (zero, {p}_number, step)
  {p}_slots = Add ({count}, one)
  {p}_none = ConstantOfShape <value = int64[1] {{0}}> ({p}_slots)
  {p}_all = ScatterElements <axis = 0> ({p}_none, {p}_to, {p}_own)
  {result}_l = Slice ({p}_all, none, {p}_count, none)
  {result} = Cast <to = 6> ({result}_l)"""
