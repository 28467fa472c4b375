"""The rest map: a low-rank affine map of the FFN's input that approximates the output of the neurons left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from threadpoolctl import threadpool_limits

from trimtab.passes.anatomy import FFN
from trimtab.passes.matrices.regress import Moments, leading_directions, reduce_rank
from trimtab.passes.sampled_ffn import SampledFFN

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge penalties of a fit, relative to the variance of each feature. Held-out states choose among them."""

_FIRST = 3  # index of the penalty that is best for most layers
_ROWS = 256  # states whose activations are copied at a time

Choose = Callable[[np.ndarray], np.ndarray]
"""States [tokens, d_model] → which blocks of neurons are computed, bool [tokens, blocks]."""


class RestOption(BaseModel):
    """The option `rest` of the passes that leave neurons out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(ge=1, description="of the map")


@dataclass(frozen=True)
class Rest:
    """s · (x A B + c), where s is the share of its blocks that a token leaves out.

    The missing output is a sum over the blocks left out, so it grows with their number. The factor s lets one map serve
    tokens that leave out few or many blocks, and all values of a dial. If all blocks are computed, s is 0 and nothing
    is added. With a constant instead of s, the error is larger (measured on SmolLM2-135M with groups of 32 neurons). It
    is largest if a dial computes more blocks than in the fit: there such a map can be worse than none.

    Attributes:
        left: A, [d_model, rank]; x A has a mean square of 1 in each column.
        right: B, [rank, d_model].
        shift: c, [d_model].
        ridge: penalty of the fit.
        error_without, error: squared error of the FFN's outputs on held-out states, relative to their variance, without
            and with the map.
    """

    left: np.ndarray
    right: np.ndarray
    shift: np.ndarray
    ridge: float
    error_without: float
    error: float

    @property
    def rank(self) -> int:
        return int(self.left.shape[1])

    @property
    def nbytes(self) -> int:
        return 4 * (self.left.size + self.right.size + self.shift.size)

    def __call__(self, x: np.ndarray, share: np.ndarray) -> np.ndarray:
        """The output of the map for states x, [tokens, d_model], that leave out `share` [tokens] of their blocks."""
        y: np.ndarray = share[:, None] * (x @ self.left @ self.right + self.shift)
        return y


def rest_bytes(ffn: FFN, option: RestOption | None) -> int:
    """Bytes of the rest map of `ffn` with this option."""
    return 0 if option is None else 4 * ffn.d_model * (2 * option.rank + 1)


def report_rest(rest: Rest | None, once: int = 1) -> dict[str, Any]:
    """The report's entries on the rest map of one layer.

    Args:
        rest: the map; None if it would not lower the error.
        once: 0 if an earlier layer shares the map, whose bytes count there; else 1.
    """
    if rest is None:
        return {"rest_rank": 0, "rest_bytes": 0}
    return {
        "rest_rank": rest.rank, "rest_bytes": once * rest.nbytes,
        "error_without_rest": round(rest.error_without, 4), "error": round(rest.error, 4),
    }  # fmt: skip


def fit_rest(layer: SampledFFN, choose: Choose, rank: int) -> Rest | None:
    """The rest map of least error on the layer's states, in closed form; None if no map lowers the held-out error.

    Let m_t be the missing output of token t, and s_t its share of blocks left out. A, B and c minimise
    Σ ‖m_t − s_t (x_t A B + c)‖² plus a ridge penalty. This is least squares of m_t / s_t with weights s_t². Its
    solution is projected on the leading directions of its outputs (reduced-rank regression, Izenman 1975).

    Args:
        choose: returns which blocks the pass computes at the default of its dial.
    """
    share, missing = _left_out(layer, choose, layer.fit, layer.h_fit)
    some = share > 0
    if not some.any():
        return None
    held_out_share, held_out_missing = _left_out(layer, choose, layer.held_out, layer.h_held_out)
    sparse = layer.y_held_out - held_out_missing
    without = layer.error(sparse)
    x, share = layer.fit[some], share[some]
    moments = Moments.of((x,), missing[some] / share[:, None], np.square(share), np.float64)
    with threadpool_limits(1, user_api="blas"):  # small factorizations: two threads only wait for each other

        def fitted(ridge: float) -> Rest:
            full = moments.solve(ridge)
            directions = leading_directions(full, moments.cov, layer.gain, rank)
            left, right = reduce_rank(full, directions, min(rank, len(full)), layer.gain)
            shift = moments.y_mean - moments.z_mean @ left @ right
            size = np.sqrt(np.maximum(np.square(x @ left).mean(0), 1e-30))  # one quantization range suits all columns
            left, right, shift = (a.astype(np.float32) for a in (left / size, right * size[:, None], shift))
            rest = Rest(left, right, shift, ridge, without, 0.0)
            return replace(rest, error=layer.error(sparse + rest(layer.held_out, held_out_share)))

        best = _least(fitted)
    return best if best.error < without else None


def _least(fitted: Callable[[float], Rest]) -> Rest:
    """The fit of least error. The search starts at the usual ridge, and tries smaller ridges, else larger ones."""
    best = fitted(RIDGES[_FIRST])
    for towards in (RIDGES[_FIRST - 1 :: -1], RIDGES[_FIRST + 1 :]):
        before = best
        for ridge in towards:
            other = fitted(ridge)
            if other.error >= best.error:
                break
            best = other
        if best is not before:
            break
    return best


def _left_out(layer: SampledFFN, choose: Choose, x: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of the blocks that each state leaves out, [tokens], and their missing output, [tokens, d_model].

    Args:
        h: activations of all neurons, [tokens, d_ff].
    """
    left = ~choose(x)
    missing = np.empty((len(x), layer.down.shape[1]), np.float32)
    for i in range(0, len(x), _ROWS):
        part = left[i : i + _ROWS]
        missing[i : i + _ROWS] = (h[i : i + _ROWS] * np.repeat(part, h.shape[1] // part.shape[1], 1)) @ layer.down
    return left.mean(1), missing
