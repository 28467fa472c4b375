"""KeepSamples: which samples of a packed batch go on to the next layer. The others leave with an early answer.

FastBERT (arXiv 2004.02178) and Magic Pyramid (arXiv 2111.00230) let a sample leave where a classifier behind a layer is
sure: where its uncertainty, the entropy of its answer over that of a uniform one, is below a threshold.

There is no GPU kernel, for the reason that KeepTokens has none: every place hangs on the counts of all before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.plugins.dialect import ACTIVATION, INT32, Form, Input, Op, Output, Value
from trimtab.plugins.rows import BOUNDS, CONSTANTS, MEMBERS, in_float, places_of
from trimtab.plugins.sizes import Counted, Shapes, Size

__all__ = ["KEEP_SAMPLES"]


def _samples(shapes: Shapes, attributes: Mapping[str, Value]) -> list[Any]:
    uncertainty = shapes["uncertainty"]
    return [Counted("stay", Size() if uncertainty is None else uncertainty[0])]


def _rows(shapes: Shapes, attributes: Mapping[str, Value]) -> list[Any]:
    x = shapes["x"]
    return [Counted("rows", Size() if x is None else x[0])]


def _starts(shapes: Shapes, attributes: Mapping[str, Value]) -> list[Any]:
    offsets = shapes["offsets"]
    return [Counted("starts", Size() if offsets is None else offsets[0])]


def _body(form: Form) -> str:
    return "\n".join(
        [
            *in_float(form, "uncertainty", "uncertainty", "doubt", "Identity ({})"),
            *in_float(form, "threshold", "threshold", "dial", "Identity ({})"),
            CONSTANTS,
            _CHOICE,
            places_of("stays", "samples", "stay"),
            BOUNDS,
            _ENDS,
            MEMBERS,
            _ROWS,
            places_of("row_stays", "tokens", "rows"),
            _OFFSETS,
        ]
    )


_CHOICE = """
  samples = Shape (doubt)
  dial_flat = Reshape (dial, minus)
  dials = Expand (dial_flat, samples)
  under = Less (doubt, dials)
  over = Not (under)
  stays = Cast <to = 7> (over)"""

_ENDS = """
  ends_ = Unsqueeze (ends, one)"""

# A row belongs to one sample at most, so the product with those that stay is 1 or 0.
_ROWS = """
  stays_f = Cast <to = 1> (over)
  stays_row = Unsqueeze (stays_f, none)
  goes_on = MatMul (stays_row, belongs)
  goes_on_ = Squeeze (goes_on, none)
  row_stays = Cast <to = 7> (goes_on_)"""

_OFFSETS = """
  lengths = Sub (ends, starts)
  own_lengths = Gather <axis = 0> (lengths, stay_l)
  own_sums = CumSum (own_lengths, zero)
  own_starts = Concat <axis = 0> (none, own_sums)
  offsets_out = Cast <to = 6> (own_starts)
"""


KEEP_SAMPLES = Op(
    "KeepSamples",
    doc="The samples of a packed batch that stay: all but those whose uncertainty is below the threshold. NaN is below "
    "none.",
    inputs=(
        Input("uncertainty", ACTIVATION, "[batch]"),
        Input("threshold", ACTIVATION, "one for all, [] or [1], or one for each sample, [batch]"),
        Input("offsets", INT32, "[batch + 1], sample b has the rows from offsets[b] to offsets[b + 1]; the last is T"),
        Input("x", ACTIVATION, "[T, width], the packed batch, of which only the number of rows counts"),
    ),
    outputs=(
        Output("stay", "tensor(int32)", "[stay], numbers of the samples that stay, ascending", _samples),
        Output("rows", "tensor(int32)", "[rows], numbers of the rows of those that stay, ascending", _rows),
        Output("offsets_out", "tensor(int32)", "[stay + 1], where each sample begins among those rows", _starts),
    ),
    attributes=(),
    body=_body,
)
