"""From a plan to weights: the two parts of one FFN, fitted to its dense outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TypeVar, cast

import numpy as np

from trimtab.passes.ffn_split.layer import Layer
from trimtab.passes.ffn_split.matrix import Dense, Half, LowRank, Matrix, Quantized
from trimtab.passes.ffn_split.plan import BITS, Neurons, Plan, Split
from trimtab.passes.ffn_split.quantize import fit_block, round_to_nearest, with_feedback
from trimtab.passes.ffn_split.regress import Moments, reduce_rank
from trimtab.passes.ffn_split.score import Score, score

T = TypeVar("T")


class Fitter:
    """Splits one FFN in as many ways as asked. What plans have in common is computed once.

    Neurons are kept in the order of their score throughout, so that heavy hitters are always a prefix.

    Args:
        precise: round integers with error feedback; without it, fits are cheap estimates for a search.
    """

    def __init__(self, layer: Layer, kind: Score, *, precise: bool = True) -> None:
        self.layer = layer
        self.precise = precise
        self._held: dict[tuple[str, str, int], object] = {}
        self.order = np.argsort(-score(layer, kind), kind="stable")
        self.ups = tuple(w[:, self.order] for w in layer.ups)
        self.up_biases = tuple(None if b is None else b[self.order] for b in layer.up_biases)
        self.down = layer.down[self.order]

    def split(self, plan: Plan) -> Split:
        """The FFN split as planned, with its error on held-out states."""
        n, d_ff = plan.heavy, self.layer.ffn.d_ff
        dense = self.layer.down_bias
        if plan.is_exact(d_ff):
            heavy = self._neurons(slice(0, n), "fp32", plan) if n else None
            others = self._neurons(slice(n, d_ff), "fp32", plan) if n < d_ff else None
            return Split(plan, heavy, others, dense if np.any(dense) else None, 0.0)
        linear: LowRank | None = None
        tail = self._tail(plan)
        correction = np.zeros((n, self.layer.ffn.d_model))
        if plan.rest_form == "affine" and n < d_ff:
            linear, correction = self._affine(plan)
        elif plan.refit and n and (n < d_ff or plan.heavy_form in BITS):
            correction = self._residual(plan, slice(self._inputs, None), tail).solve()
        down = (self.down[:n] + correction).astype(np.float32)
        head = self._neurons(slice(0, n), plan.heavy_form, plan, down) if n else None
        rest: Neurons | LowRank | None = linear if linear is not None else tail
        offset = self._mean_output - self._outputs(self.layer.fit, head, rest).mean(0)
        bias = (dense + offset).astype(np.float32)
        error = self.layer.error(self._outputs(self.layer.held, head, rest) + offset)
        return Split(plan, head, rest, bias, error)

    @property
    def _inputs(self) -> int:
        return self.layer.ffn.d_model

    @cached_property
    def _mean_output(self) -> np.ndarray:
        found: np.ndarray = self.layer.h_fit.mean(0, dtype=np.float64) @ self.layer.down
        return found

    @cached_property
    def _input_moments(self) -> np.ndarray:
        """E[x xᵀ], [d_model, d_model]."""
        x = self.layer.fit
        return x.T @ x / len(x)

    def _once(self, what: str, form: str, block: int, make: Callable[[], T]) -> T:
        """What `make` returns, kept for as long as this layer is fitted."""
        key = (what, form, block)
        if key not in self._held:
            self._held[key] = make()
        return cast("T", self._held[key])

    def _up_matrices(self, form: str, block: int) -> tuple[Dense | Quantized, ...]:
        """The up projections of all neurons in an integer form: columns are independent, so parts are slices of it."""
        return self._once(
            "ups", form, block, lambda: tuple(self._quantized(w, form, block, self._input_moments) for w in self.ups)
        )

    def _moments(self, form: str, block: int) -> Moments:
        """Of [x, h] and the dense outputs, with h from heavy neurons in `form`."""
        return self._once(
            "moments", form, block, lambda: Moments.of((self.layer.fit, self._hidden(form, block)), self._dense_outputs)
        )

    def _hidden(self, form: str, block: int) -> np.ndarray:
        """h of all neurons in `form`, on the states to fit to."""
        if form not in BITS:
            return self._ordered

        def make() -> np.ndarray:
            ups = tuple(m.array for m in self._up_matrices(form, block))
            return self.layer.hidden(self.layer.fit, ups, self.up_biases)

        return self._once("hidden", form, block, make)

    @cached_property
    def _ordered(self) -> np.ndarray:
        return self.layer.h_fit[:, self.order]

    @cached_property
    def _dense_outputs(self) -> np.ndarray:
        return self.layer.h_fit @ self.layer.down

    def _residual(self, plan: Plan, features: slice, tail: Neurons | None) -> Moments:
        """Moments of [x, h of heavy neurons], or a slice of them, and what the dense outputs are beyond both parts."""
        n, d = plan.heavy, self._inputs
        everything = self._moments(plan.heavy_form, plan.block)
        cov = everything.cov[: d + n, : d + n]
        cross = everything.cross[: d + n] - cov[:, d:] @ self.down[:n]
        if tail is not None:
            z = (self.layer.fit, self._hidden(plan.heavy_form, plan.block)[:, :n])
            cross = cross - Moments.of(z, self._neuron_outputs(self.layer.fit, tail)).cross
        mean = everything.z_mean[: d + n]
        return Moments(mean[features], everything.y_mean, cov[features, features], cross[features])

    def _affine(self, plan: Plan) -> tuple[LowRank, np.ndarray]:
        """One low-rank map of x in place of the rest, and the correction of the heavy neurons' down projection."""
        d, n = self._inputs, plan.heavy
        features = slice(0, None) if plan.refit else slice(0, d)
        moments = self._residual(plan, features, None)
        if plan.refit:
            full = moments.solve()[:d]
        else:
            full = Moments(moments.z_mean, moments.y_mean, moments.cov, self._rest_cross(plan)).solve()
        gain = self.layer.gain
        left, right = reduce_rank(full, moments.cov[:d, :d], min(plan.rank, d), gain)
        correction = np.zeros((n, d))
        if plan.refit and n:
            rank = left.shape[1]
            transform = np.zeros((d + n, rank + n))
            transform[:d, :rank], transform[d:, rank:] = left, np.eye(n)
            again = moments.mapped(transform).solve()
            right, correction = again[:rank], again[rank:]
        balance = np.sqrt(np.linalg.norm(right, axis=1) / np.maximum(np.linalg.norm(left, axis=0), 1e-30))
        left, right = left * balance, right / np.maximum(balance, 1e-30)[:, None]
        form = {"fp32": "fp32", "fp16": "fp16"}.get(plan.heavy_form, "int8")
        thin = self.layer.fit @ left
        return (
            LowRank(
                self._matrix(left.astype(np.float32), form, plan.block, self._input_moments),
                self._matrix(right.astype(np.float32), form, plan.block, thin.T @ thin / len(thin)),
            ),
            correction,
        )

    def _rest_cross(self, plan: Plan) -> np.ndarray:
        """Covariance of x and the outputs of the rest alone."""
        rest = self.layer.h_fit[:, self.order[plan.heavy :]] @ self.down[plan.heavy :]
        return Moments.of((self.layer.fit,), rest).cross

    def _tail(self, plan: Plan) -> Neurons | None:
        """FFN2 as neurons, where its form keeps them."""
        part = slice(plan.heavy, self.layer.ffn.d_ff)
        if plan.rest_form in ("drop", "affine") or part.start == part.stop:
            return None
        if plan.rest_form != "low-rank":
            return self._neurons(part, plan.rest_form, plan)
        h = self.layer.h_fit[:, self.order[part]]
        gain = np.ones(part.stop - part.start)
        return Neurons(
            tuple(_weighted_svd(w[:, part], self._input_moments, plan.rank, gain) for w in self.ups),
            tuple(None if b is None else b[part] for b in self.up_biases),
            _weighted_svd(self.down[part], h.T @ h / len(h), plan.rank, self.layer.gain),
        )

    def _neurons(self, part: slice, form: str, plan: Plan, down: np.ndarray | None = None) -> Neurons:
        """The neurons of `part` in `form`; `down` replaces their rows of W_down."""
        biases = tuple(None if b is None else b[part] for b in self.up_biases)
        down = self.down[part] if down is None else down
        if form not in BITS:
            ups = tuple(self._matrix(w[:, part], form, plan.block, None) for w in self.ups)
            return Neurons(ups, biases, self._matrix(down, form, plan.block, None))
        quantized = tuple(m.columns(part) for m in self._up_matrices(form, plan.block))
        h = self.layer.hidden(self.layer.fit, tuple(m.array for m in quantized), biases)
        return Neurons(quantized, biases, self._matrix(down, form, plan.block, h.T @ h / len(h)))

    def _matrix(self, weight: np.ndarray, form: str, block: int, moments: np.ndarray | None) -> Matrix:
        if form == "fp32" or (form in BITS and fit_block(block, len(weight)) is None):
            return Dense(weight)
        if form == "fp16":
            return Half(weight)
        return self._quantized(weight, form, block, moments)

    def _quantized(self, weight: np.ndarray, form: str, block: int, moments: np.ndarray | None) -> Dense | Quantized:
        size = fit_block(block, len(weight))
        if size is None:
            return Dense(weight)
        if self.precise and moments is not None and BITS[form] < 8:
            return with_feedback(weight, BITS[form], size, moments)
        return round_to_nearest(weight, BITS[form], size)

    def _neuron_outputs(self, x: np.ndarray, part: Neurons) -> np.ndarray:
        return self.layer.hidden(x, tuple(m.array for m in part.ups), part.up_biases) @ part.down.array

    def _outputs(self, x: np.ndarray, heavy: Neurons | None, rest: Neurons | LowRank | None) -> np.ndarray:
        """What both parts compute, without bias, [n, d_model]."""
        y = np.zeros((len(x), self._inputs), np.float32)
        for part in (heavy, rest):
            if isinstance(part, LowRank):
                y += (x @ part.left.array) @ part.right.array
            elif part is not None:
                y += self._neuron_outputs(x, part)
        return y


def _weighted_svd(weight: np.ndarray, moments: np.ndarray, rank: int, gain: np.ndarray) -> LowRank:
    """The low-rank pair of least error on inputs with second moments E[x xᵀ], not of least error in the weights."""
    left, right = reduce_rank(weight.astype(np.float64), moments.astype(np.float64), min(rank, *weight.shape), gain)
    return LowRank(Dense(left.astype(np.float32)), Dense(right.astype(np.float32)))
