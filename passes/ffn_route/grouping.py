"""Groups of neurons of one size: balanced k-means on the directions of their weights.

Neurons whose rows point the same way are active for the same inputs, so a router can switch them together.
"""

from __future__ import annotations

import logging

import numpy as np
from scipy.optimize import linear_sum_assignment

from trimtab.passes.errors import RecipeError

log = logging.getLogger(__name__)

_ROUNDS = 20  # rounds of k-means: later ones move hardly any neuron
_NARROW = 512  # width of a random projection in which wide rows are grouped first, which is a few times faster
_FULL_ROUNDS = 4  # rounds in full width after the projection
_MOVED = 0.002  # k-means has converged when at most this share of the neurons moves
_SINKHORN = 30  # steps per round, starting from the prices of the previous round
_SHARPNESS = 5.0  # sharpness of the entropic transport, relative to the spread of similarities
_EXACT = 512  # number of neurons placed by an exact assignment, whose cost grows with the cube of this number


def check_groups(d_ff: int, group: int, where: str) -> None:
    """Refuse a group size that does not divide an FFN's neurons.

    Args:
        where: name of the FFN in the message.

    Raises:
        RecipeError: names the sizes near `group` that do divide it.
    """
    if d_ff % group:
        divisors = [size for size in range(1, d_ff + 1) if d_ff % size == 0]
        near = sorted(sorted(divisors, key=lambda size: abs(size - group))[:3])
        raise RecipeError(
            f"group: groups of {group} do not divide the {d_ff} neurons of {where}",
            hint=f"use groups of {', '.join(map(str, near))}",
        )


def group_neurons(rows: np.ndarray, group: int, *, seed: int = 0) -> np.ndarray:
    """An order of the neurons in which each run of `group` neighbours is a group.

    The features of a neuron are its row of W_up, or of W_gate if the FFN is gated, scaled to length 1.

    Args:
        rows: [d_ff, d_model].
        group: neurons per group; divides d_ff.
        seed: seed of the initial centres; the same seed gives the same order.

    Returns:
        numbers of the neurons, [d_ff]: those of group g are order[g * group : (g + 1) * group], in ascending order.

    Raises:
        RecipeError: `group` does not divide d_ff.
    """
    count = len(rows)
    check_groups(count, group, "the FFN")
    if group in (1, count):
        return np.arange(count)
    features = unit_rows(rows)
    rng = np.random.default_rng(seed)
    order = rng.permutation(count)
    if features.shape[1] > 2 * _NARROW:
        projection = rng.standard_normal((features.shape[1], _NARROW), dtype=np.float32)
        order = _k_means(features @ projection, order, group, _ROUNDS)
        return _k_means(features, order, group, _FULL_ROUNDS)
    return _k_means(features, order, group, _ROUNDS)


def _k_means(features: np.ndarray, order: np.ndarray, group: int, rounds: int) -> np.ndarray:
    """Improve an order in the format of `group_neurons`, [rows]."""
    labels = np.empty(len(order), int)
    labels[order] = np.arange(len(order)) // group
    prices = np.zeros(len(order) // group, np.float32)
    lengths = np.square(features).sum(1)
    for number in range(rounds):
        centres = features[order].reshape(-1, group, features.shape[1]).mean(1)
        similarity = features @ centres.T
        own = np.arange(len(labels)), labels  # leave out the neuron's own part, which would keep it in its group
        similarity[own] = (group * similarity[own] - lengths) / (group - 1)
        before = labels
        labels, prices = _assign(similarity, group, prices)
        order = np.argsort(labels, kind="stable")
        moved = float((labels != before).mean())
        log.debug("grouping: round %d moves %.2f %% of the neurons", number, 100 * moved)
        if moved <= _MOVED:
            break
    return order


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """`rows` scaled to length 1, float32; rows of zeros stay."""
    rows = np.asarray(rows, np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def inertia(rows: np.ndarray, order: np.ndarray, group: int) -> float:
    """Mean squared distance of the unit rows from the mean of their group.

    Args:
        rows, order, group: as of `group_neurons`.
    """
    grouped = unit_rows(rows)[order].reshape(-1, group, rows.shape[1])
    return float(((grouped - grouped.mean(1, keepdims=True)) ** 2).sum(-1).mean())


def _assign(similarity: np.ndarray, group: int, prices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A label for each row with a nearly maximal sum of similarities. Each label is used `group` times.

    Sinkhorn's steps (Cuturi 2013, arXiv 1306.0895) give each centre a price at which about `group` rows prefer it. The
    few surplus rows of a centre are placed at other centres.

    Args:
        similarity: [rows, centres], float32.
        prices: initial prices, [centres].

    Returns:
        labels [rows] and prices.
    """
    scale = _SHARPNESS / max(float(similarity.std()), 1e-12)
    scaled = similarity * np.float32(scale)
    kernel = np.exp(scaled - scaled.max(1, keepdims=True))
    weights = np.exp(prices - prices.max())
    for _ in range(_SINKHORN):
        per_row = 1 / np.maximum(kernel @ weights, 1e-30)
        weights = group / np.maximum(per_row @ kernel, 1e-30)
        weights = np.maximum(weights / weights.max(), 1e-20).astype(np.float32)
    prices = np.log(weights)
    return _place(scaled + prices, group), prices


def _place(wishes: np.ndarray, group: int) -> np.ndarray:
    """A label for each row of `wishes` [rows, centres], each used `group` times: greedy, and exact at the end."""
    rows, centres = wishes.shape
    labels, room = np.full(rows, -1), np.full(centres, group)
    waiting = np.arange(rows)
    while len(waiting) > _EXACT or len(waiting) == rows:
        open_wishes = np.where(room > 0, wishes[waiting], -np.inf)
        best = open_wishes.argmax(1)
        first = open_wishes[np.arange(len(waiting)), best]
        open_wishes[np.arange(len(waiting)), best] = -np.inf
        margin = first - np.maximum(open_wishes.max(1), -1e30)
        order = np.lexsort((-margin, best))  # at each centre, the rows that lose most elsewhere come first
        ranks = np.arange(len(order)) - np.searchsorted(best[order], best[order])
        placed = order[ranks < room[best[order]]]
        labels[waiting[placed]] = best[placed]
        room -= np.bincount(best[placed], minlength=centres)
        waiting = np.setdiff1d(waiting, waiting[placed])
    slots = np.repeat(np.arange(centres), room)
    chosen_rows, places = linear_sum_assignment(-wishes[np.ix_(waiting, slots)]) if len(waiting) else ([], [])
    labels[waiting[chosen_rows]] = slots[places]
    return labels
