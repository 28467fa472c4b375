"""Groups of neurons: exactly balanced, the same for the same seed, and as tight as an exact assignment makes them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.cluster.vq import kmeans2
from scipy.optimize import linear_sum_assignment

from trimtab.passes.errors import RecipeError
from trimtab.passes.ffn_route.grouping import group_neurons, inertia, unit_rows

SEED = int(np.random.default_rng().integers(1 << 30))


def planted(groups: int, size: int, width: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Neurons around random directions, in random order and of random lengths; and the direction of each."""
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    directions = rng.standard_normal((groups, width))
    labels = rng.permutation(np.repeat(np.arange(groups), size))
    rows = directions[labels] + noise * rng.standard_normal((groups * size, width))
    return rows * rng.uniform(0.1, 10, (len(rows), 1)), labels


def partition(order: np.ndarray, size: int) -> set[frozenset[int]]:
    return {frozenset(map(int, group)) for group in order.reshape(-1, size)}


@pytest.mark.parametrize(("groups", "size", "width"), [(12, 8, 64), (40, 4, 1200)])  # the wide one is projected first
def test_planted_groups_come_together(groups: int, size: int, width: int) -> None:
    rows, labels = planted(groups, size, width, noise=0.2)
    order = group_neurons(rows, size)
    assert sorted(order) == list(range(groups * size))
    together = np.mean([len(set(labels[group])) == 1 for group in order.reshape(-1, size)])
    assert together >= 0.5  # k-means from random centres may join two groups and part others
    assert all((np.diff(group) > 0).all() for group in order.reshape(-1, size))
    assert inertia(rows, order, size) < 0.5 * inertia(rows, np.random.default_rng(0).permutation(len(rows)), size)
    assert partition(order, size) == partition(group_neurons(rows, size), size)


def test_as_tight_as_an_exact_assignment_and_nearly_as_plain_k_means() -> None:
    rows, _ = planted(24, 16, 48, noise=1.5)
    order = group_neurons(rows, 16)
    features = unit_rows(rows)
    centres = features[order].reshape(-1, 16, 48).mean(1)
    similarity = np.repeat(features @ centres.T - 0.5 * (centres**2).sum(1), 16, 1)
    row, place = linear_sum_assignment(-similarity)
    exact = similarity[row, place].mean()
    own = np.repeat(np.arange(24), 16)
    reached = (features[order] * centres[own]).sum(1).mean() - 0.5 * (centres**2).sum(1).mean()
    assert exact - reached <= 0.01 * abs(exact)
    means, labels = kmeans2(features, 24, seed=0, minit="++")
    plain = float(((features - means[labels]) ** 2).sum(1).mean())
    shuffled = inertia(rows, np.random.default_rng(SEED).permutation(len(rows)), 16)
    assert inertia(rows, order, 16) < plain + 0.3 * (shuffled - plain)


@pytest.mark.parametrize("rows", [np.ones((96, 5)), np.zeros((96, 5)), np.eye(96), np.repeat(np.eye(3), 32, 0)])
def test_rows_that_are_alike_are_balanced_too(rows: np.ndarray) -> None:
    order = group_neurons(rows, 8)
    assert sorted(order) == list(range(96))


def test_one_group_and_groups_of_one_change_nothing() -> None:
    rows, _ = planted(4, 5, 7, noise=1.0)
    for group in (1, 20):
        np.testing.assert_array_equal(group_neurons(rows, group), np.arange(20))


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"groups of 32 do not divide the 80 neurons .* groups of 16, 20, 40"):
        group_neurons(np.ones((80, 3)), 32)


def test_small_groups_leave_where_they_began() -> None:
    """A neuron is a good part of the centre of a small group, and must not be held there by itself."""
    rows, _ = planted(60, 4, 96, noise=1.2)
    shuffled = inertia(rows, np.random.default_rng(0).permutation(len(rows)), 4)
    assert inertia(rows, group_neurons(rows, 4), 4) < 0.8 * shuffled
