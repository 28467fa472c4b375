"""Paths for `speed`: of all staircases through a grid that was measured the best one, and its Pareto front."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise, product

import numpy as np
import pytest

from trimtab.compiler.checks.frontier import Place, Point, cheapest, grid, levels, measured_path, pareto, walk
from trimtab.passes.dials import Dial
from trimtab.passes.errors import InputError, ModelError

SEED = int(np.random.default_rng().integers(1 << 30))
PRUNE = Dial("prune", "", 0.0, 4.0, 1.0, exact=0.0, fast=4.0)
EXIT = Dial("exit_threshold", "", 0.0, 1.0, 0.1, exact=0.0, fast=1.0)
KEEP = Dial("keep", "", 0.1, 1.0, 0.5, exact=1.0, fast=0.1)


def measured(rng: np.random.Generator, shape: tuple[int, ...], noise: float) -> dict[Place, Point]:
    """A grid on which FLOPs and score fall along each axis, up to noise."""
    dials = [f"d{axis}" for axis in range(len(shape))]
    steps = [np.cumsum(rng.uniform(0.2, 0.5, (2, size)), 1) for size in shape]

    def measure(setting: dict[str, float]) -> tuple[int, float]:
        places = [int(setting[name]) for name in dials]
        lost, saved = (sum(step[row, place] for step, place in zip(steps, places, strict=True)) for row in (0, 1))
        return int(1e9 * math.exp(-saved + noise * rng.normal())), 1 - lost / 5 + noise * rng.normal()

    return walk({name: range(size) for name, size in zip(dials, shape, strict=True)}, measure)


def staircases(points: dict[Place, Point]) -> Iterator[list[Point]]:
    """All ways from the first point to the last one."""
    last = max(points)
    steps = [step for step in product((0, 1), repeat=len(last)) if any(step)]

    def onwards(place: tuple[int, ...]) -> Iterator[list[Point]]:
        if place == last:
            yield [points[place]]
        for step in steps:
            ahead = tuple(i + j for i, j in zip(place, step, strict=True))
            if ahead in points:
                yield from ([points[place], *rest] for rest in onwards(ahead))

    return onwards(min(points))


def area(stairs: list[Point]) -> float:
    return sum(max(0.0, math.log(a.flops / b.flops)) * (a.score + b.score) / 2 for a, b in pairwise(stairs))


@pytest.mark.parametrize("shape", [(5,), (3, 4), (1, 4), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_path_is_the_front_of_the_best_staircase(shape: tuple[int, ...], noise: float) -> None:
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    for _ in range(10):
        points = measured(rng, shape, noise)
        path = measured_path(points)
        known = {tuple(point.dials.values()): point for point in points.values()}
        taken = [known[tuple(each.dials.values())] for each in path]
        assert taken[0] is points[min(points)] and taken[-1].flops == min(point.flops for point in points.values())
        assert path[0].speed == 0 and path[-1].speed == 1
        for (a, b), (p, q) in zip(pairwise(taken), pairwise(path), strict=True):
            assert b.flops < a.flops and q.speed > p.speed
            assert a is taken[0] or b.score < a.score
            assert all(later >= earlier for earlier, later in zip(a.dials.values(), b.dials.values(), strict=True))
        whole = math.log(taken[0].flops / taken[-1].flops)
        np.testing.assert_allclose([p.speed for p in path], [math.log(taken[0].flops / p.flops) / whole for p in taken])
        if noise == 0:  # then the last point is the fastest, and no point of a staircase beats another
            assert area(taken) == pytest.approx(max(area(stairs) for stairs in staircases(points)))


def test_the_fastest_setting_may_be_limited() -> None:
    rng = np.random.default_rng(SEED)
    for _ in range(10):
        points = measured(rng, (4, 4), 0.0)
        first = points[min(points)]
        drop = 100 * (first.score - np.median([point.score for point in points.values()]))
        known = {tuple(point.dials.values()): point for point in points.values()}
        taken = [known[tuple(each.dials.values())] for each in measured_path(points, drop)]
        allowed = [point for point in points.values() if point.score >= first.score - drop / 100]
        assert taken[-1].flops == min(point.flops for point in allowed) and all(each in allowed for each in taken)
    with pytest.raises(ModelError, match="loses at most 0 points against it"):
        measured_path(points, 0.0)


def test_front_and_choice_are_what_a_search_finds() -> None:
    rng = np.random.default_rng(SEED)
    points = [Point({"d": float(n)}, int(rng.integers(1, 12)), float(rng.integers(0, 9))) for n in range(40)]
    front = pareto(points)
    for point in points:
        beaten = [p for p in points if p.flops <= point.flops and p.score >= point.score and p != point]
        better = any(p.flops < point.flops or p.score > point.score for p in beaten)
        assert better or any((p.flops, p.score) == (point.flops, point.score) for p in front)
    assert all(a.flops > b.flops and a.score > b.score for a, b in pairwise(front))
    for least in (0.0, 4.0, max(point.score for point in points)):
        chosen = cheapest(points, least)
        assert chosen is not None and chosen.flops == min(p.flops for p in points if p.score >= least)
    assert cheapest(points, 9.5) is None


def test_levels_go_from_exact_to_fast() -> None:
    assert levels(PRUNE) == (0, 0.25, 0.5, 1, 2, 4)
    np.testing.assert_allclose(levels(EXIT), [0, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1])
    for dial in (KEEP, Dial("off", "", -1, 1, 0.0, exact=0.0, fast=-1.0), Dial("still", "", 0, 1, 0, exact=0, fast=0)):
        found = levels(dial)
        assert found[0] == dial.exact and found[-1] == dial.fast
        assert all(abs(b - dial.exact) > abs(a - dial.exact) for a, b in pairwise(found))
    assert grid([KEEP, EXIT], {"keep": [0.2, 1.0, 0.6]}) == {"keep": (1.0, 0.6, 0.2), "exit_threshold": levels(EXIT)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kep": [0.5]}, "did you mean 'keep'"),
        ({"keep": [2.0]}, "dial 'keep' is 2"),
        ({"keep": [float("nan")]}, "dial 'keep' is nan"),
        ({"off": [0.5]}, "0.5 is not on the way from exact"),
    ],
    ids=str,
)
def test_impossible_values(values: dict[str, list[float]], message: str) -> None:
    with pytest.raises(InputError) as caught:
        grid([KEEP, Dial("off", "", -1, 1, 0.0, exact=0.0, fast=-1.0)], values)
    assert message in str(caught.value)
