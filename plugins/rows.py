"""Statements that reference bodies of several ops share."""

from __future__ import annotations

from trimtab.plugins.dialect import FLOAT, Form

_ONNX = {"tensor(float16)": 10, "tensor(bfloat16)": 16}
"""ONNX's numbers of the types that are brought to float, and back."""


def in_float(form: Form, name: str, source: str, result: str, op: str) -> list[str]:
    """Statements that make `result` = `op`, in float: `op` reads `source`, which is of the type of the input `name`."""
    if form.given.get(name, FLOAT[0]) in FLOAT:
        return [f"  {result} = {op.format(source)}"]
    return [f"  {result}_n = {op.format(source)}", f"  {result} = Cast <to = 1> ({result}_n)"]


def as_input(form: Form, name: str, result: str, op: str) -> list[str]:
    """Statements that make `result` = `op`, of what is in float, in the type of the input `name`."""
    if form.given[name] in FLOAT:
        return [f"  {result} = {op}"]
    return [f"  {result}_f = {op}", f"  {result} = Cast <to = {_ONNX[form.given[name]]}> ({result}_f)"]


def numbers_of_rows(form: Form, x: str = "x", block: str = "@block") -> str:
    """Makes `rows` [tokens or 1, n], the numbers of the neurons in `blocks`, and `flat` [tokens, 1, width] of x."""
    size = f"value_int: int = {block}" if block.startswith("@") else f"value_int = {block}"
    flat = "\n".join(in_float(form, x, x, "flat", "Reshape ({}, flat_shape)"))
    return f"""
  zero = Constant <value_int = 0> ()
  step = Constant <value_int = 1> ()
  one = Constant <value_ints = [1]> ()
  minus = Constant <value_ints = [-1]> ()
  two = Constant <value_ints = [2]> ()
  block_ = Constant <{size}> ()
  wide = Cast <to = 7> (blocks)
  starts = Mul (wide, block_)
  starts_ = Unsqueeze (starts, two)
  within = Range (zero, block_, step)
  each = Add (starts_, within)
  groups = Shape <start = 0, end = 1> (blocks)
  taken = Shape <start = 1> (blocks)
  many = Mul (taken, block_)
  rows_shape = Concat <axis = 0> (groups, many)
  rows = Reshape (each, rows_shape)
  width = Shape <start = -1> ({x})
  flat_shape = Concat <axis = 0> (minus, one, width)
{flat}"""


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

    It reads the scalars `zero` and `step`, which is 1, and `none` [0], `one` [1], `minus` [-1] and `end` [the largest].
    It also makes `<result>_p_counts` [count + 1], how many came before, and `<result>_l`, `result` in int64.
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
