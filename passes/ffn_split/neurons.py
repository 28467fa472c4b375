"""All neurons of one FFN, ordered by score, in several weight forms. Parts of an FFN are slices of this order."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TypeVar, cast

import numpy as np

from trimtab.passes.ffn_split.plan import BITS, Neurons
from trimtab.passes.ffn_split.score import Score, score
from trimtab.passes.matrices.forms import Dense, Half, Matrix, Quantized
from trimtab.passes.matrices.quantize import fit_block, round_to_nearest, with_feedback
from trimtab.passes.matrices.regress import Moments, cross_covariance
from trimtab.passes.sampled_ffn import SampledFFN

T = TypeVar("T")


class OrderedNeurons:
    """Activations and weights of the neurons of one FFN, heavy hitters first.

    A neuron's activation depends only on its own columns of the up projections. So activations are computed once per
    form for all neurons, and any prefix or rest of them is a slice.

    Args:
        layer: the FFN; its neurons are reordered.
        kind: the score that orders the neurons.
        reach: number of heaviest neurons in the second moments, whose memory grows with its square.
        precise: round integers with error feedback; without it, rounding is a cheap estimate for a search.
    """

    def __init__(self, layer: SampledFFN, kind: Score, *, reach: int, precise: bool) -> None:
        self.layer = layer
        self.reach = reach
        self.precise = precise
        layer.reorder(np.argsort(-score(layer, kind), kind="stable"))
        self._cache: dict[tuple[object, ...], object] = {}

    def neurons(self, part: slice, form: str, block: int, down: np.ndarray | None = None) -> Neurons:
        """The neurons of `part` in `form`; `down` replaces their rows of W_down."""
        down = self.layer.down[part] if down is None else down
        biases = tuple(None if b is None else b[part] for b in self.layer.up_biases)
        if form not in BITS:
            return Neurons(
                tuple(self.matrix(w[:, part], form, block) for w in self.layer.ups),
                biases,
                self.matrix(down, form, block),
            )
        moments = None
        if self._feeds_back(form):
            h = self.hidden(form, block)[:, part]
            moments = h.T @ h / len(h)
        ups = tuple(m.columns(part) for m in self._quantized_ups(form, block))
        return Neurons(ups, biases, self.matrix(down, form, block, moments))

    def matrix(self, weight: np.ndarray, form: str, block: int, moments: np.ndarray | None = None) -> Matrix:
        """`weight` in `form`; unchanged if no block size divides its input features.

        Args:
            moments: E[x xᵀ] of the weight's inputs; without it, integers are rounded to nearest.
        """
        if form == "fp16":
            return Half(weight)
        return Dense(weight) if form not in BITS else self._quantized(weight, form, block, moments)

    def hidden(self, form: str, block: int, *, held_out: bool = False) -> np.ndarray:
        """Activations of all neurons in `form`, on the states for fits or the held-out states, [n, d_ff]."""
        states = self.layer.held_out if held_out else self.layer.fit

        def make() -> np.ndarray:
            if form not in BITS:
                return self.layer.h_held_out if held_out else self.layer.h_fit
            ups = tuple(m.array for m in self._quantized_ups(form, block))
            return self.layer.hidden(states, ups, self.layer.up_biases)

        return self._once(("hidden", self._values_of(form), block, held_out), make)

    def mean(self, form: str, block: int) -> np.ndarray:
        """Mean activations on the states for fits, [d_ff]."""
        return self._once(
            ("mean", self._values_of(form), block), lambda: self.hidden(form, block).mean(0, dtype=np.float64)
        )

    def moments(self, form: str, block: int) -> Moments:
        """Moments of [x, h within reach] and the dense outputs, with h in `form`."""
        parts = (self.layer.fit, self.hidden(form, block)[:, : self.reach])
        return self._once(("moments", self._values_of(form), block), lambda: Moments.of(parts, self.layer.y_fit))

    def cross(self, form: str, other: str, block: int) -> np.ndarray:
        """Covariance of [x, h within reach in `form`] and all h in the `other` form, [d_model + reach, d_ff]."""
        parts = (self.layer.fit, self.hidden(form, block)[:, : self.reach])
        return self._once(
            ("cross", self._values_of(form), self._values_of(other), block),
            lambda: cross_covariance(parts, self.hidden(other, block)),
        )

    @cached_property
    def input_moments(self) -> np.ndarray:
        """E[x xᵀ], [d_model, d_model]."""
        x = self.layer.fit
        return x.T @ x / len(x)

    @staticmethod
    def _values_of(form: str) -> str:
        """Cache key of a form's activations. Half precision changes activations so little that fp16 shares fp32's."""
        return form if form in BITS else "fp32"

    def _feeds_back(self, form: str) -> bool:
        return self.precise and BITS[form] < 8  # int8 loses nothing worth the time

    def _quantized_ups(self, form: str, block: int) -> tuple[Dense | Quantized, ...]:
        return self._once(
            ("ups", form, block),
            lambda: tuple(self._quantized(w, form, block, self.input_moments) for w in self.layer.ups),
        )

    def _quantized(self, weight: np.ndarray, form: str, block: int, moments: np.ndarray | None) -> Dense | Quantized:
        size = fit_block(block, len(weight))
        if size is None:
            return Dense(weight)
        if moments is not None and self._feeds_back(form):
            return with_feedback(weight, BITS[form], size, moments)
        return round_to_nearest(weight, BITS[form], size, search=self.precise)

    def _once(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        """The result of `make`, cached for the lifetime of this object."""
        if key not in self._cache:
            self._cache[key] = make()
        return cast("T", self._cache[key])
