"""Routers without training (MoEfication, arXiv 2110.01786): groups and routers that follow from calibration states."""

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
"""Score from which on a group is computed, for the sparsity that was asked for."""

GroupBy = Literal["need", "weights"]

_RIDGES = (1e-2, 1e-1, 1.0, 10.0)  # relative to the variance of each feature; states that no fit sees choose
_APART = 5  # every fifth state to fit to is kept from the fit, to choose the ridge and the threshold
_FLOOR = 1e-3  # of the mean contribution: what adds less counts as this much
_TOKENS = 2048  # that say which neurons are needed together
_ROWS = 256  # states whose contributions are computed at a time


@dataclass(frozen=True)
class Fitted:
    """What is found for FFNs that share their weights.

    Attributes:
        order: of the neurons, [d_ff]: those of a group are neighbours, and the router counts groups in this order.
        sparsity: share of the neurons that is left out, on held-out states.
        error: squared error of the outputs on held-out states, relative to their variance, without the rest.
        rest: what stands for the groups that are left out.
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
    """Groups, a router and perhaps a rest for `layer`, whose neurons are put in the order of their groups.

    Args:
        group: neurons of a group; divides their number.
        sparsity: share of the neurons that is left out where scores of `THRESHOLD` are computed.
        cut: score from which on groups are computed; what is measured, and the rest, are of this.
        cap: share of the groups that a token may take.
        rank: of the rest.

    Raises:
        RecipeError: each token computes one group at least, and so more than is asked for.
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
    """An order in which groups are neighbours, [d_ff].

    Args:
        by: "need": neurons of a group are among those that add most to the output of the same tokens. "weights": their
            rows of W_up, or of W_gate, point the same way, as in the paper.
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
    found = np.empty((len(h), groups), np.float32)
    for i in range(0, len(h), _ROWS):
        part = h[i : i + _ROWS].reshape(-1, groups, group).swapaxes(0, 1)
        found[i : i + _ROWS] = ((part @ products) * part).sum(-1).T
    return np.maximum(found, 0)


def fit_router(layer: SampledFFN, group: int, sparsity: float) -> LinearRouter:
    """A router whose scores are c / (c + c₀): c what a group is expected to add to the output, c₀ the threshold.

    log c is a linear function of the FFN's input, by least squares with a ridge penalty. Scores of 0.5 and more leave
    out the sparsity that is asked for.

    Args:
        layer: its neurons in the order of their groups.
    """
    added = contributions(layer.h_fit, layer.down, group)
    wanted = np.log(np.maximum(added, _FLOOR * float(added.mean()) or 1.0))
    apart = np.arange(len(wanted)) % _APART == _APART - 1
    if not apart.any():
        apart[-1:] = True
    seen = ~apart if len(apart) > 1 else apart
    moments = Moments.of((layer.fit[seen],), wanted[seen])
    solutions = [(moments.solve(ridge).astype(np.float32)) for ridge in _RIDGES]
    x = layer.fit[apart] - moments.z_mean.astype(np.float32)
    missing = wanted[apart] - moments.y_mean.astype(np.float32)
    best = solutions[int(np.argmin([np.square(x @ slopes - missing).sum() for slopes in solutions]))]
    bias = moments.y_mean - moments.z_mean @ best
    cut = float(cuts(layer.fit[apart] @ best + bias.astype(np.float32), np.array([sparsity]))[0])
    return LinearRouter(np.ascontiguousarray(best.T), (bias - cut).astype(np.float32))
