"""Turns a plan into weights: fits the two parts of one FFN to its dense outputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trimtab.passes.ffn_split.neurons import OrderedNeurons
from trimtab.passes.ffn_split.plan import BITS, Neurons, Plan, Split
from trimtab.passes.ffn_split.score import Score
from trimtab.passes.matrices.forms import Dense, LowRank
from trimtab.passes.matrices.regress import Moments, leading_directions, reduce_rank
from trimtab.passes.sampled_ffn import SampledFFN


class Fitter:
    """Splits one FFN by several plans. Intermediate results that plans share are computed once.

    Args:
        kind: the score that orders the neurons.
        plans: all plans that `split` will be called with.
        precise: round integers with error feedback; without it, fits are cheap estimates for a search.
    """

    def __init__(self, layer: SampledFFN, kind: Score, plans: Sequence[Plan], *, precise: bool = True) -> None:
        self.layer = layer
        self._rank = max(plan.rank for plan in plans)
        self.ordered = OrderedNeurons(layer, kind, reach=max(plan.heavy for plan in plans), precise=precise)
        self._maps: dict[tuple[int, str, int, bool], tuple[np.ndarray, np.ndarray]] = {}

    def split(self, plan: Plan) -> Split:
        """The FFN split as planned, with its error on held-out states."""
        n, d_ff = plan.heavy, self.layer.ffn.d_ff
        ordered, dense_bias = self.ordered, self.layer.down_bias
        heavy, rest = slice(0, n), slice(n, d_ff)
        if plan.is_exact(d_ff):
            first, second = (
                ordered.neurons(part, "fp32", plan.block) if part.start < part.stop else None for part in (heavy, rest)
            )
            return Split(plan, first, second, dense_bias if np.any(dense_bias) else None, 0.0)
        tail: Neurons | LowRank | None = None
        correction = np.zeros((n, self._inputs))
        if n == d_ff or plan.rest_form == "drop":
            pass
        elif plan.rest_form == "affine":
            tail, correction = self._affine(plan)
        elif plan.rest_form == "low-rank":
            tail = self._low_rank(plan)
        else:
            tail = ordered.neurons(rest, plan.rest_form, plan.block)
        if plan.refit and n and (n == d_ff or plan.rest_form not in ("affine", "low-rank")):
            correction = self._residual(plan, tail).part(slice(self._inputs, None)).solve()
        down = (self.layer.down[:n] + correction).astype(np.float32)
        head = ordered.neurons(heavy, plan.heavy_form, plan.block, down) if n else None
        offset = self.layer.mean_output - self._mean_output(plan, head, tail)
        error = self.layer.error(self._held_out_output(plan, head, tail) + offset)
        return Split(plan, head, tail, (dense_bias + offset).astype(np.float32), error)

    @property
    def _inputs(self) -> int:
        return self.layer.ffn.d_model

    def _residual(self, plan: Plan, tail: Neurons | LowRank | None) -> Moments:
        """Moments of [x, h of heavy neurons] and of the residual: the dense outputs minus both parts."""
        n, d = plan.heavy, self._inputs
        everything = self.ordered.moments(plan.heavy_form, plan.block)
        cross = everything.cross[: d + n] - everything.cov[: d + n, d : d + n] @ self.layer.down[:n]
        if isinstance(tail, Neurons):
            shared = self.ordered.cross(plan.heavy_form, plan.rest_form, plan.block)[: d + n, n:]
            cross = cross - shared @ tail.down.array
        z_mean, cov = everything.z_mean[: d + n], everything.cov[: d + n, : d + n]
        return Moments(z_mean, everything.y_mean, cov, cross)

    def _affine(self, plan: Plan) -> tuple[LowRank, np.ndarray]:
        """One low-rank map of x in place of the rest, and the correction of the heavy neurons' down projection."""
        d, n, gain = self._inputs, plan.heavy, self.layer.gain
        moments = self._residual(plan, None)
        full, directions = self._full_map(plan, moments)
        left, right = reduce_rank(full, directions, min(plan.rank, d), gain)
        correction = np.zeros((n, d))
        if plan.refit and n:
            rank = left.shape[1]
            again = moments.compressed(left).solve()
            right, correction = again[:rank], again[rank:]
        # Scale the bottleneck to the activations, so that both share one quantization range.
        h = self.ordered.hidden(plan.heavy_form, plan.block)[:, : n or None]
        mean_square = np.square(h).mean() or 1.0  # all neurons may be 0 on the calibration data
        size = np.sqrt(mean_square / np.maximum(np.square(self.layer.fit @ left).mean(0), 1e-30))
        left, right = left * size, right / size[:, None]
        form = "int8" if plan.heavy_form in BITS else plan.heavy_form
        pair = (self.ordered.matrix(m.astype(np.float32), form, plan.block) for m in (left, right))
        return LowRank(*pair), correction

    def _full_map(self, plan: Plan, moments: Moments) -> tuple[np.ndarray, np.ndarray]:
        """The best map of x without a limit of rank, and the directions of its outputs, most important first."""
        key = (plan.heavy, plan.heavy_form, plan.block, plan.refit)
        if key not in self._maps:
            d = self._inputs
            if plan.refit:
                full = moments.solve()[:d].copy()  # a view would keep the whole solution in memory
            else:
                n, ordered = plan.heavy, self.ordered
                cross = ordered.cross("fp32", "fp32", plan.block)[:d, n:] @ self.layer.down[n:]
                full = Moments(moments.z_mean[:d], moments.y_mean, moments.cov[:d, :d], cross).solve()
            self._maps[key] = full, leading_directions(full, moments.cov[:d, :d], self.layer.gain, self._rank)
        return self._maps[key]

    def _low_rank(self, plan: Plan) -> Neurons:
        """The rest as neurons with low-rank pairs as projections, of least error on the calibration inputs."""
        ordered, part = self.ordered, slice(plan.heavy, self.layer.ffn.d_ff)
        h = ordered.hidden("fp32", plan.block)[:, part]
        ones = np.ones(part.stop - part.start)
        return Neurons(
            tuple(_weighted_svd(w[:, part], ordered.input_moments, plan.rank, ones) for w in self.layer.ups),
            tuple(None if b is None else b[part] for b in self.layer.up_biases),
            _weighted_svd(self.layer.down[part], h.T @ h / len(h), plan.rank, self.layer.gain),
        )

    def _mean_output(self, plan: Plan, head: Neurons | None, tail: Neurons | LowRank | None) -> np.ndarray:
        """Mean output of both parts on the states for fits, [d_model]."""
        n, total = plan.heavy, np.zeros(self._inputs)
        if head is not None:
            total += self.ordered.mean(plan.heavy_form, plan.block)[:n] @ head.down.array
        if isinstance(tail, LowRank):
            total += self.layer.fit.mean(0, dtype=np.float64) @ tail.array
        elif tail is not None and plan.rest_form == "low-rank":
            total += self._computed(self.layer.fit, tail).mean(0, dtype=np.float64)
        elif tail is not None:
            total += self.ordered.mean(plan.rest_form, plan.block)[n:] @ tail.down.array
        return total

    def _held_out_output(self, plan: Plan, head: Neurons | None, tail: Neurons | LowRank | None) -> np.ndarray:
        """Output of both parts on the held-out states, without bias, [m, d_model]."""
        n, y = plan.heavy, np.zeros((len(self.layer.held_out), self._inputs), np.float32)
        if head is not None:
            y += self.ordered.hidden(plan.heavy_form, plan.block, held_out=True)[:, :n] @ head.down.array
        if isinstance(tail, LowRank):
            y += self.layer.held_out @ tail.left.array @ tail.right.array
        elif tail is not None and plan.rest_form == "low-rank":
            y += self._computed(self.layer.held_out, tail)
        elif tail is not None:
            y += self.ordered.hidden(plan.rest_form, plan.block, held_out=True)[:, n:] @ tail.down.array
        return y

    def _computed(self, x: np.ndarray, part: Neurons) -> np.ndarray:
        return self.layer.hidden(x, tuple(m.array for m in part.ups), part.up_biases) @ part.down.array


def _weighted_svd(weight: np.ndarray, moments: np.ndarray, rank: int, gain: np.ndarray) -> LowRank:
    """The low-rank pair of least error on inputs with second moments E[x xᵀ], not of least error in the weights."""
    full = weight.astype(np.float64)
    directions = leading_directions(full, moments.astype(np.float64), gain, rank)
    left, right = reduce_rank(full, directions, min(rank, *weight.shape), gain)
    return LowRank(Dense(left.astype(np.float32)), Dense(right.astype(np.float32)))
