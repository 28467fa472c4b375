"""One FFN in numbers: its weights, a sample of its inputs, and its activations and outputs on that sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, reduce

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.anatomy import FFN
from trimtab.passes.anatomy.activation import evaluate
from trimtab.passes.errors import ProfileError
from trimtab.passes.matrices.in_range import out_of_range
from trimtab.passes.profile import FFNStats, Profile

_HELD_OUT = 5  # every fifth state measures errors and is never used in a fit
_MAX_SPREAD = 3  # limit of a feature's weight, in multiples of the median spread
_SHARED = 4  # limit of the states of layers that share weights, in multiples of one layer's states
_ROWS = 128  # states evaluated at a time: the activation runs in float64

_SCALED = {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}
_SKIP_SCALED = {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"}


class FFNWeights:
    """An FFN's weights as float32 arrays. Each is read at its first use."""

    def __init__(self, ffn: FFN) -> None:
        self.ffn = ffn

    @cached_property
    def ups(self) -> tuple[np.ndarray, ...]:
        """W_up, or (W_gate, W_up): [d_model, d_ff] each, in the order of the activation's inputs."""
        return tuple(linear.w().astype(np.float32) for linear in self.ffn.linears[:-1])

    @cached_property
    def up_biases(self) -> tuple[np.ndarray | None, ...]:
        """The biases of `ups`, [d_ff] or None each."""
        biases = (linear.b() for linear in self.ffn.linears[:-1])
        return tuple(None if b is None else b.astype(np.float32) for b in biases)

    @cached_property
    def down(self) -> np.ndarray:
        """W_down, [d_ff, d_model]."""
        return self.ffn.down.w().astype(np.float32)

    @cached_property
    def down_bias(self) -> np.ndarray:
        """The bias of the down projection, [d_model]; zeros if the FFN has none."""
        b = self.ffn.down.b()
        return np.zeros(self.ffn.d_model, np.float32) if b is None else b.astype(np.float32)

    def act(self, pre: tuple[np.ndarray, ...]) -> np.ndarray:
        """Activations from the projections' outputs, [n, any width], float32."""
        activation = self.ffn.activation
        out = np.empty(pre[0].shape, np.float32)
        for i in range(0, len(out), _ROWS):
            feeds = {id(t): p[i : i + _ROWS] for t, p in zip(activation.inputs, pre, strict=True)}
            out[i : i + _ROWS] = evaluate(activation.nodes, feeds, activation.output)
        return out

    def hidden(self, x: np.ndarray, ups: tuple[np.ndarray, ...], biases: tuple[np.ndarray | None, ...]) -> np.ndarray:
        """Activations h of the neurons with these projections, [n, neurons]."""
        pre = tuple(x @ w if b is None else x @ w + b for w, b in zip(ups, biases, strict=True))
        return self.act(pre)

    def reorder(self, order: np.ndarray) -> None:
        """Put the neurons in another order, [d_ff]. The graph is not changed, and the FFN computes the same."""
        self.ups = tuple(w[:, order] for w in self.ups)
        self.up_biases = tuple(None if b is None else b[order] for b in self.up_biases)
        self.down = self.down[order]


class SampledFFN(FFNWeights):
    """An FFN and its calibration states; or several FFNs with the same weights, treated as one.

    Layers that share weights read different states. Fits use the states of all of them, and a token counts the same in
    every layer.

    Attributes:
        ffn: the view on the graph; the first one of several.
        stats: statistics of the Profile, summed over the layers.
        fit: states for fits, [n, d_model], layer after layer.
        held_out: states that only measure errors, [m, d_model].
    """

    def __init__(self, ffn: FFN, stats: FFNStats, others: Sequence[tuple[FFN, FFNStats]] = ()) -> None:
        super().__init__(ffn)
        self.stats = reduce(_add_stats, (more for _, more in others), stats)
        self._ffns = (ffn, *(other for other, _ in others))
        step = -(-len(self._ffns) // _SHARED)
        all_stats = (stats, *(more for _, more in others))
        parts = [_split_states(each.states, step, i % step) for i, each in enumerate(all_stats)]
        self.fit = np.concatenate([fit for fit, _ in parts])
        self.held_out = np.concatenate([held_out for _, held_out in parts])
        self._held_out_sizes = [len(held_out) for _, held_out in parts]

    def reorder(self, order: np.ndarray) -> None:
        super().reorder(order)
        stats = self.stats
        self.stats = replace(
            stats, abs_sum=stats.abs_sum[order], sum=stats.sum[order], square_sum=stats.square_sum[order]
        )
        for name in {"h_fit", "h_held_out"} & vars(self).keys():
            h = vars(self)[name]
            for i in range(0, len(h), _ROWS):  # in place: a copy of the activations would dominate memory
                h[i : i + _ROWS] = h[i : i + _ROWS, order]

    @cached_property
    def h_fit(self) -> np.ndarray:
        """h of all neurons on the states for fits, [n, d_ff]."""
        return self.hidden(self.fit, self.ups, self.up_biases)

    @cached_property
    def h_held_out(self) -> np.ndarray:
        return self.hidden(self.held_out, self.ups, self.up_biases)

    @cached_property
    def y_fit(self) -> np.ndarray:
        """The dense outputs on the states for fits, without the down bias, [n, d_model]."""
        return self.h_fit @ self.down

    @cached_property
    def mean_output(self) -> np.ndarray:
        """Mean of `y_fit`, [d_model], float64."""
        mean: np.ndarray = self.h_fit.mean(0, dtype=np.float64) @ self.down
        return mean

    @cached_property
    def y_held_out(self) -> np.ndarray:
        """The dense outputs on the held-out states, without the down bias, [m, d_model]."""
        return self.h_held_out @ self.down

    @cached_property
    def gain(self) -> np.ndarray:
        """Weight of each output feature in a fit, [d_model]: the scale of the next norm, averaged over the layers."""
        gains = np.stack([_gain(ffn) for ffn in self._ffns])
        mean: np.ndarray = gains.mean(0)
        return mean

    @cached_property
    def yardstick(self) -> np.ndarray:
        """Weight of each output feature where errors of layers are compared, [d_model].

        In some layers one feature has nearly all the variance of the outputs (98 % in MiniLM's first FFN), and the next
        norm divides it out again. So the weight of a feature is limited to a few times the median. A fit still has to
        reproduce such a feature, since the norm's divisor depends on it.
        """
        variances = [self.y_held_out[rows].var(0) for rows in self._held_out_parts()]
        spread = self.gain * np.sqrt(np.mean(variances, axis=0))
        return self.gain * np.minimum(1, _MAX_SPREAD * np.median(spread) / np.maximum(spread, 1e-30))

    def error(self, y: np.ndarray) -> float:
        """Squared error of outputs `y` (without the down bias) on the held-out states, relative to their variance.

        Both are weighted by `yardstick`. For layers that share weights, this is the mean of their errors.

        Raises:
            ModelError: the outputs are so large that their squares overflow.
        """
        errors = []
        for rows in self._held_out_parts():
            dense = self.y_held_out[rows]
            spread = (dense - dense.mean(0)) * self.yardstick
            errors.append(np.square((y[rows] - dense) * self.yardstick).sum() / max(np.square(spread).sum(), 1e-30))
        error = float(np.mean(errors))
        if not np.isfinite(error):
            raise out_of_range()
        return error

    def _held_out_parts(self) -> Iterator[slice]:
        """The held-out rows of each layer."""
        start = 0
        for size in self._held_out_sizes:
            yield slice(start, start + size)
            start += size


def sample_ffn(ffn: FFN, profile: Profile, others: Sequence[FFN] = ()) -> SampledFFN:
    """`ffn`, and `others` with the same weights, with their statistics from the Profile.

    Raises:
        ProfileError: the Profile has no statistics of a layer, or fewer than 2 finite states.
    """
    return SampledFFN(ffn, _stats(ffn, profile), [(other, _stats(other, profile)) for other in others])


def _stats(ffn: FFN, profile: Profile) -> FFNStats:
    stats = profile.ffn(ffn.layer, ffn.d_ff, ffn.d_model)
    if len(stats.states) < 2 or not np.all(np.isfinite(stats.states)):
        raise ProfileError(
            f"{ffn.where}: {len(stats.states)} finite states in the profile, at least 2 are needed",
            hint="calibrate on more data",
        )
    return stats


def _add_stats(a: FFNStats, b: FFNStats) -> FFNStats:
    """The added sums of two layers, with the states of the first."""
    sums = a.abs_sum + b.abs_sum, a.sum + b.sum, a.square_sum + b.square_sum
    return FFNStats(a.tokens + b.tokens, *sums, a.states)


def _split_states(states: np.ndarray, step: int, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """States for fits and held-out states; every `step`-th of each, from `offset` on."""
    held_out = np.arange(len(states)) % _HELD_OUT == _HELD_OUT - 1
    if not held_out.any():
        held_out[-1:] = True
    fit = states[~held_out] if not held_out.all() else states
    parts = (fit, states[held_out])
    return tuple(part[min(offset, len(part) - 1) :: step] for part in parts)  # type: ignore[return-value]


def _gain(ffn: FFN) -> np.ndarray:
    scale = _next_norm_scale(ffn.y)
    if scale is None or scale.shape != (ffn.d_model,):
        return np.ones(ffn.d_model, np.float64)
    gain = np.abs(scale.astype(np.float64))
    return np.maximum(gain, 0.05 * gain.mean())


def _next_norm_scale(tensor: gs.Tensor) -> np.ndarray | None:
    """The scale of the first norm that reads `tensor`, directly or after Adds of residuals and biases."""
    for _ in range(3):
        for node in tensor.outputs:
            at = 1 if node.op in _SCALED else 2 if node.op in _SKIP_SCALED else None
            if at is not None and len(node.inputs) > at and isinstance(node.inputs[at], gs.Constant):
                return np.asarray(node.inputs[at].values)
        adds = [node for node in tensor.outputs if node.op == "Add"]
        if not adds:
            return None
        tensor = adds[0].outputs[0]
    return None
