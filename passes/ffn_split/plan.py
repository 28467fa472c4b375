"""The plan for splitting one FFN, and the fitted split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from trimtab.passes.matrices.forms import LowRank, Matrix

HeavyForm = Literal["fp32", "fp16", "int8", "int4"]
RestForm = Literal["fp32", "fp16", "int8", "int4", "int2", "low-rank", "drop", "affine"]

BITS = {"int8": 8, "int4": 4, "int2": 2}


@dataclass(frozen=True)
class Plan:
    """How to split one FFN.

    Attributes:
        heavy: number of neurons in FFN1.
        heavy_form: form of FFN1's weights.
        rest_form: form of FFN2.
        rank: rank of FFN2's low-rank matrices or affine map.
        block: limit of the input features that share a scale in integer forms.
        refit: fit FFN1's down projection again to the dense outputs, to compensate the error of FFN2.
    """

    heavy: int
    heavy_form: HeavyForm
    rest_form: RestForm
    rank: int
    block: int
    refit: bool

    def is_exact(self, d_ff: int) -> bool:
        """True if the split computes what the dense FFN does: all weights kept as they are."""
        return (self.heavy == 0 or self.heavy_form == "fp32") and (self.heavy == d_ff or self.rest_form == "fp32")


@dataclass(frozen=True)
class Neurons:
    """Neurons that compute y += act(x W_up + b_up) W_down, with a gate if the FFN has one.

    Attributes:
        ups: W_up, or (W_gate, W_up); [d_model, neurons] each.
        up_biases: [neurons] or None, for each of `ups`.
        down: [neurons, d_model].
    """

    ups: tuple[Matrix, ...]
    up_biases: tuple[np.ndarray | None, ...]
    down: Matrix

    @property
    def nbytes(self) -> int:
        return sum(m.nbytes for m in (*self.ups, self.down)) + sum(4 * b.size for b in self.up_biases if b is not None)

    @property
    def macs(self) -> int:
        return sum(m.macs for m in (*self.ups, self.down))


@dataclass(frozen=True)
class Split:
    """An FFN in two parts: y = heavy(x) + rest(x) + bias.

    Attributes:
        heavy: FFN1, or None if no neuron is heavy.
        rest: FFN2 as neurons or as the linear part of an affine map; None if FFN2 is dropped or empty.
        bias: sum of the down projection's bias and all constant parts, [d_model], or None.
        error: squared error of the outputs on held-out states, relative to their variance.
    """

    plan: Plan
    heavy: Neurons | None
    rest: Neurons | LowRank | None
    bias: np.ndarray | None
    error: float

    @property
    def nbytes(self) -> int:
        parts = sum(part.nbytes for part in (self.heavy, self.rest) if part is not None)
        return parts + (0 if self.bias is None else 4 * self.bias.size)

    @property
    def macs(self) -> int:
        return sum(part.macs for part in (self.heavy, self.rest) if part is not None)
