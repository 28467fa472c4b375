"""One FFN in numbers: its weights, a sample of its inputs, and what its neurons make of them."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.anatomy import FFN
from trimtab.passes.anatomy.activation import evaluate
from trimtab.passes.errors import ProfileError
from trimtab.passes.profile import FFNStats, Profile

_HELD_OUT = 5  # every fifth state measures errors and is never fitted to
_MOST = 3  # times the typical spread that a feature may count for
_ROWS = 128  # states evaluated at a time: the activation runs in float64

_SCALED = {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}
_SKIP_SCALED = {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"}


class Layer:
    """An FFN, and the states it was calibrated on.

    Attributes:
        ffn: the view on the graph.
        stats: from the Profile.
        fit: states that fits may use, [n, d_model].
        held: states that only measure, [m, d_model].
    """

    def __init__(self, ffn: FFN, stats: FFNStats) -> None:
        self.ffn = ffn
        self.stats = stats
        held = np.arange(len(stats.states)) % _HELD_OUT == _HELD_OUT - 1
        if not held.any():
            held[-1:] = True
        self.fit = stats.states[~held] if not held.all() else stats.states
        self.held = stats.states[held]

    @cached_property
    def ups(self) -> tuple[np.ndarray, ...]:
        """W_up, or (W_gate, W_up): [d_model, d_ff] each, in the order of the activation's inputs."""
        return tuple(linear.w().astype(np.float32) for linear in self.ffn.linears[:-1])

    @cached_property
    def up_biases(self) -> tuple[np.ndarray | None, ...]:
        found = (linear.b() for linear in self.ffn.linears[:-1])
        return tuple(None if b is None else b.astype(np.float32) for b in found)

    @cached_property
    def down(self) -> np.ndarray:
        """W_down, [d_ff, d_model]."""
        return self.ffn.down.w().astype(np.float32)

    @cached_property
    def down_bias(self) -> np.ndarray:
        b = self.ffn.down.b()
        return np.zeros(self.ffn.d_model, np.float32) if b is None else b.astype(np.float32)

    def reorder(self, order: np.ndarray) -> None:
        """Put the neurons in another order, [d_ff], here and not in the graph. The FFN computes the same."""
        stats = self.stats
        self.stats = replace(
            stats, abs_sum=stats.abs_sum[order], sum=stats.sum[order], square_sum=stats.square_sum[order]
        )
        self.ups = tuple(w[:, order] for w in self.ups)
        self.up_biases = tuple(None if b is None else b[order] for b in self.up_biases)
        self.down = self.down[order]
        for name in {"h_fit", "h_held"} & vars(self).keys():
            h = vars(self)[name]
            for i in range(0, len(h), _ROWS):  # in place: a copy of the activations would be the most memory of all
                h[i : i + _ROWS] = h[i : i + _ROWS, order]

    def act(self, pre: tuple[np.ndarray, ...]) -> np.ndarray:
        """Activations from the projections' outputs, [n, any width], float32."""
        activation = self.ffn.activation
        out = np.empty(pre[0].shape, np.float32)
        for i in range(0, len(out), _ROWS):
            feeds = {id(t): p[i : i + _ROWS] for t, p in zip(activation.inputs, pre, strict=True)}
            out[i : i + _ROWS] = evaluate(activation.nodes, feeds, activation.output)
        return out

    def hidden(self, x: np.ndarray, ups: tuple[np.ndarray, ...], biases: tuple[np.ndarray | None, ...]) -> np.ndarray:
        """Activations h of neurons given by their projections, [n, neurons]."""
        pre = tuple(x @ w if b is None else x @ w + b for w, b in zip(ups, biases, strict=True))
        return self.act(pre)

    @cached_property
    def h_fit(self) -> np.ndarray:
        """h of all neurons on the states to fit to, [n, d_ff]."""
        return self.hidden(self.fit, self.ups, self.up_biases)

    @cached_property
    def h_held(self) -> np.ndarray:
        return self.hidden(self.held, self.ups, self.up_biases)

    @cached_property
    def y_fit(self) -> np.ndarray:
        """The dense outputs on the states to fit to, without the down bias, [n, d_model]."""
        return self.h_fit @ self.down

    @cached_property
    def mean_output(self) -> np.ndarray:
        """Mean of `y_fit`, [d_model], float64."""
        found: np.ndarray = self.h_fit.mean(0, dtype=np.float64) @ self.down
        return found

    @cached_property
    def y_held(self) -> np.ndarray:
        """The dense outputs on the held-out states, without the down bias, [m, d_model]."""
        return self.h_held @ self.down

    @cached_property
    def gain(self) -> np.ndarray:
        """How much each output feature weighs in a fit: the scale of the next norm, [d_model]."""
        scale = _next_norm_scale(self.ffn.y)
        if scale is None or scale.shape != (self.ffn.d_model,):
            return np.ones(self.ffn.d_model, np.float64)
        found = np.abs(scale.astype(np.float64))
        return np.maximum(found, 0.05 * found.mean())

    @cached_property
    def yardstick(self) -> np.ndarray:
        """How much each output feature weighs where errors of layers are compared, [d_model].

        In some layers one feature has nearly all the variance of the outputs (98 % in MiniLM's first FFN), and the norm
        behind divides it out again. So no feature counts for more than a few typical ones; a fit still has to get it
        right, since the norm's divisor hangs on it.
        """
        spread = self.gain * self.y_held.std(0)
        return self.gain * np.minimum(1, _MOST * np.median(spread) / np.maximum(spread, 1e-30))

    def error(self, y: np.ndarray) -> float:
        """Squared error of outputs `y` (without the down bias) on the held-out states, relative to their variance.

        Both are weighted by `yardstick`.
        """
        spread = (self.y_held - self.y_held.mean(0)) * self.yardstick
        return float(np.square((y - self.y_held) * self.yardstick).sum() / max(np.square(spread).sum(), 1e-30))


def read_layer(ffn: FFN, profile: Profile) -> Layer:
    """The layer of `ffn` with what the Profile knows of it.

    Raises:
        ProfileError: it knows nothing, or nothing that can be fitted to.
    """
    stats = profile.ffn(ffn.layer, ffn.d_ff, ffn.d_model)
    if len(stats.states) < 2 or not np.all(np.isfinite(stats.states)):
        raise ProfileError(
            f"{ffn.where}: {len(stats.states)} finite states in the profile, at least 2 are needed",
            hint="calibrate on more data",
        )
    return Layer(ffn, stats)


def _next_norm_scale(tensor: gs.Tensor) -> np.ndarray | None:
    """The scale of the norm that first reads `tensor`, through the Adds of residuals and biases."""
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
