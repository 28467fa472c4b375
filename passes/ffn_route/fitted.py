"""Routers without training (MoEfication, arXiv 2110.01786): groups and routers fitted to calibration states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from trimtab.passes.ffn_route.grouping import group_neurons
from trimtab.passes.ffn_route.router import LinearRouter
from trimtab.passes.ffn_route.routers import Routers
from trimtab.passes.ffn_topk.importance import most_important, norms
from trimtab.passes.matrices.regress import Moments
from trimtab.passes.sampled_ffn import SampledFFN
from trimtab.passes.sparse_ffn import Rest, check_sparsity, fit_rest
from trimtab.passes.sparse_ffn.shares import cuts

THRESHOLD = 0.5
"""Score from which on a group is computed at the requested sparsity."""

GroupBy = Literal["need", "weights"]

_RIDGES = (1e-2, 1e-1, 1.0, 10.0)  # relative to the variance of each feature; states outside the fit choose one
_APART = 5  # every fifth state is kept out of the fit, to choose the ridge and the threshold
_FLOOR = 1e-3  # lower bound of contributions, relative to their mean
_TOKENS = 2048  # tokens in the comparison of which neurons are needed together
_ROWS = 256  # states whose contributions are computed at a time


@dataclass(frozen=True)
class Fitted:
    """Fitted router of FFNs that share their weights.

    Attributes:
        order: order of the neurons, [d_ff]. The neurons of a group are neighbours; groups are numbered in this order.
        sparsity: share of the neurons that is left out, on held-out states.
        error: squared error of the outputs on held-out states, relative to their variance, without the rest map.
        rest: the rest map, which approximates the groups left out.
    """

    router: LinearRouter
    order: np.ndarray
    sparsity: float
    error: float
    rest: Rest | None = None


def fit(
    layer: SampledFFN, group: int, sparsity: float, by: GroupBy, *, cut: float = THRESHOLD, cap: float = 1.0,
    rank: int | None = None,
) -> Fitted:  # fmt: skip
    """Fit groups, a router and, if `rank` is given, a rest map to `layer`. Its neurons are put in group order.

    Args:
        group: neurons per group; divides the number of neurons.
        sparsity: share of the neurons that is left out if groups with scores from `THRESHOLD` on are computed.
        cut: score from which on groups are computed in the measurement and in the fit of the rest map.
        cap: share of the groups that a token may take.
        rank: rank of the rest map.

    Raises:
        RecipeError: the FFN cannot reach the sparsity, since each token computes at least one group.
    """
    check_sparsity(layer.ffn, sparsity, group, "group")
    order = order_neurons(layer, group, sparsity, by)
    layer.reorder(order)
    router = fit_router(layer, group, sparsity)
    routers = Routers({layer.ffn.layer: router}, THRESHOLD, None)

    def choose(x: np.ndarray) -> np.ndarray:
        return routers.chosen(router.scores(x), cut, router.share(cap))

    taken = choose(layer.held_out)
    y = (layer.h_held_out * np.repeat(taken, group, 1)) @ layer.down
    rest = None if rank is None else fit_rest(layer, choose, rank)
    return Fitted(router, order, 1 - float(taken.mean()), layer.error(y), rest)


def order_neurons(layer: SampledFFN, group: int, sparsity: float, by: GroupBy) -> np.ndarray:
    """An order of the neurons in which the neurons of a group are neighbours, [d_ff].

    Args:
        by: "need": the same tokens need the neurons of a group. "weights": the neurons' rows of W_up, or of W_gate,
            point the same way, as in the paper.
    """
    if by == "weights":
        return group_neurons(layer.ups[0].T, group)
    added = np.abs(layer.h_fit[:_TOKENS]) * norms(layer)
    needed = np.full(added.shape, -0.5, np.float32)
    best = most_important(added, max(1, round((1 - sparsity) * added.shape[1])))
    np.put_along_axis(needed, best, 0.5, axis=1)
    return group_neurons(needed.T, group)


def contributions(h: np.ndarray, down: np.ndarray, group: int) -> np.ndarray:
    """‖h_g W_g‖² of each group's part of the output, [tokens, groups], of h [tokens, d_ff]."""
    groups = h.shape[1] // group
    rows = down.reshape(groups, group, -1)
    products = rows @ rows.swapaxes(1, 2)  # of each group, [groups, group, group]
    sizes = np.empty((len(h), groups), np.float32)
    for i in range(0, len(h), _ROWS):
        part = h[i : i + _ROWS].reshape(-1, groups, group).swapaxes(0, 1)
        sizes[i : i + _ROWS] = ((part @ products) * part).sum(-1).T
    return np.maximum(sizes, 0)


def fit_router(layer: SampledFFN, group: int, sparsity: float) -> LinearRouter:
    """A router with scores c / (c + c₀): c is the expected contribution of a group to the output, c₀ the threshold.

    log c is a linear function of the FFN's input, fitted by least squares with a ridge penalty. Computing the groups
    with scores of at least 0.5 gives the requested sparsity.

    Args:
        layer: the FFN, with its neurons in group order.
    """
    added = contributions(layer.h_fit, layer.down, group)
    targets = np.log(np.maximum(added, _FLOOR * float(added.mean()) or 1.0))
    apart = np.arange(len(targets)) % _APART == _APART - 1
    if not apart.any():
        apart[-1:] = True
    seen = ~apart if len(apart) > 1 else apart
    moments = Moments.of((layer.fit[seen],), targets[seen])
    solutions = [(moments.solve(ridge).astype(np.float32)) for ridge in _RIDGES]
    x = layer.fit[apart] - moments.z_mean.astype(np.float32)
    missing = targets[apart] - moments.y_mean.astype(np.float32)
    best = solutions[int(np.argmin([np.square(x @ slopes - missing).sum() for slopes in solutions]))]
    bias = moments.y_mean - moments.z_mean @ best
    cut = float(cuts(layer.fit[apart] @ best + bias.astype(np.float32), np.array([sparsity]))[0])
    return LinearRouter(np.ascontiguousarray(best.T), (bias - cut).astype(np.float32))
