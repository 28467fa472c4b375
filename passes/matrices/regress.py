"""Least squares from second moments, so that many candidate fits cost one pass over the samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve, eigh

from trimtab.passes.matrices.in_range import in_range

RIDGE = 1e-3
"""Ridge penalty relative to each feature's variance."""

_ROWS = 1024


@dataclass(frozen=True)
class Moments:
    """First and second moments of features z, [n], and of their products with targets y, [m].

    Attributes:
        z_mean, y_mean: [n], [m].
        cov: covariance of z, [n, n]; the largest array of a fit.
        cross: covariance of z and y, [n, m].
    """

    z_mean: np.ndarray
    y_mean: np.ndarray
    cov: np.ndarray
    cross: np.ndarray

    @classmethod
    def of(
        cls, parts: Sequence[np.ndarray], y: np.ndarray, weights: np.ndarray | None = None,
        dtype: type[np.floating] = np.float32,
    ) -> Moments:  # fmt: skip
        """The moments of samples of groups of features, [samples, n_i] each, and of targets, [samples, m].

        Products are summed over chunks of rows, so that centring copies only one chunk.

        Args:
            weights: the weight of each sample, [samples], at least 0; None for equal weights.
            dtype: the type of the products and their sums.
        """
        z_mean = np.concatenate([_mean(part, weights) for part in parts])
        y_mean = _mean(y, weights)
        n, count = len(z_mean), len(y) if weights is None else weights.sum()
        cov, cross = np.zeros((n, n), dtype), np.zeros((n, len(y_mean)), dtype)
        for i, z in _centred(parts, z_mean, dtype):
            weighted = z if weights is None else z * weights[i : i + _ROWS, None].astype(dtype)
            cov += weighted.T @ z
            cross += weighted.T @ (y[i : i + _ROWS] - y_mean.astype(dtype))
        cov /= count
        cross /= count
        return cls(z_mean, y_mean, cov, cross)

    @in_range()
    def solve(self, ridge: float = RIDGE) -> np.ndarray:
        """C that minimises E‖y − ȳ − (z − z̄) C‖² plus the ridge penalty, [n, m]."""
        scale = np.sqrt(np.maximum(np.diag(self.cov).astype(np.float64), 0))  # rounding puts a constant below 0
        scale = np.where(scale > 1e-12 * max(scale.max(initial=0), 1e-30), scale, np.inf)
        normal = self.cov / scale
        normal /= scale[:, None]
        normal[np.diag_indices_from(normal)] = np.where(np.isinf(scale), 1.0, 1.0 + ridge)
        factor = cho_factor(normal.T, overwrite_a=True)  # symmetric; LAPACK would copy a matrix in C order
        coefficients: np.ndarray = cho_solve(factor, self.cross / scale[:, None]) / scale[:, None]
        return coefficients

    def part(self, features: slice) -> Moments:
        """The moments of some of the features."""
        return Moments(self.z_mean[features], self.y_mean, self.cov[features, features], self.cross[features])

    def compressed(self, left: np.ndarray) -> Moments:
        """The moments if the first d features x are replaced by x A, for A [d, rank]."""
        d = len(left)
        mixed = left.T @ self.cov[:d, d:]
        cov = np.block([[left.T @ self.cov[:d, :d] @ left, mixed], [mixed.T, self.cov[d:, d:]]])
        cross = np.concatenate([left.T @ self.cross[:d], self.cross[d:]])
        return Moments(np.concatenate([left.T @ self.z_mean[:d], self.z_mean[d:]]), self.y_mean, cov, cross)


def cross_covariance(parts: Sequence[np.ndarray], y: np.ndarray) -> np.ndarray:
    """Only the covariance of features and targets, as in `Moments.of`, [n, m], float32."""
    z_mean = np.concatenate([part.mean(0, dtype=np.float64) for part in parts])
    cross = np.zeros((len(z_mean), y.shape[1]), np.float32)
    for i, z in _centred(parts, z_mean, np.float32):
        cross += z.T @ y[i : i + _ROWS]  # centring one of the two is enough
    return cross / len(y)


def _mean(samples: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """The weighted mean of samples [samples, n], in float64."""
    if weights is None:
        return np.asarray(samples.mean(0, dtype=np.float64))
    return np.asarray(weights.astype(np.float64) @ samples / weights.sum(dtype=np.float64))


def _centred(
    parts: Sequence[np.ndarray], z_mean: np.ndarray, dtype: type[np.floating]
) -> Iterator[tuple[int, np.ndarray]]:  # fmt: skip
    """Chunks of rows: the index of the first row, and the features side by side, minus their means."""
    for i in range(0, len(parts[0]), _ROWS):
        yield i, np.concatenate([part[i : i + _ROWS] for part in parts], axis=1) - z_mean.astype(dtype)


@in_range()
def leading_directions(coefficients: np.ndarray, cov: np.ndarray, gain: np.ndarray, count: int) -> np.ndarray:
    """Orthonormal directions of the weighted outputs x M diag(gain), [m, count], those of largest variance first.

    Args:
        coefficients: M, [n, m].
        cov: the covariance of x, [n, n].
        gain: the weight of each output, [m].
        count: the maximum number of directions.
    """
    weighted = coefficients * gain
    last = len(gain) - 1
    directions = eigh(weighted.T @ cov @ weighted, subset_by_index=(max(0, last + 1 - count), last))[1]
    return directions[:, ::-1]


def reduce_rank(
    coefficients: np.ndarray, directions: np.ndarray, rank: int, gain: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The map of `rank` that best approximates the weighted outputs of a full one.

    Minimises E‖(x M − x A B) diag(gain)‖² by projecting the outputs on their leading directions: reduced-rank
    regression (Izenman 1975), not the SVD of M.

    Returns:
        A [n, rank] and B [rank, m].
    """
    leading = directions[:, :rank]
    return (coefficients * gain) @ leading, leading.T / gain
