"""Turns measured settings of dials into the path of `speed`: ever fewer FLOPs, at the best quality.

`walk` measures a grid with one axis for each dial, which starts at the dial's exact value. The path is the staircase
through the grid with the largest area below quality over log FLOPs. Each dial moves in one direction along the path, so
that FLOPs fall between its points, too. A point that a later one beats in FLOPs and quality is left out: the Pareto
front of the staircase remains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from trimtab.passes.dials import Dial, Dials, SpeedPoint
from trimtab.passes.errors import InputError, ModelError

_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Levels of a dial, as multiples of the distance from its exact value to its default."""

_EVEN = 6  # steps of a dial whose default is not between exact and fast


Place = tuple[int, ...]
"""The place of a setting in a grid: the index of each dial's value, 0 for the exact one."""


@dataclass(frozen=True)
class Point:
    """A measured setting.

    Attributes:
        dials: dial → value.
        flops: FLOPs executed for all samples together.
        score: task quality; 1 is best.
    """

    dials: dict[str, float]
    flops: int
    score: float


def levels(dial: Dial) -> tuple[float, ...]:
    """Values of a dial, from exact to fast, denser near the exact end."""
    span, to_default = dial.fast - dial.exact, dial.default - dial.exact
    if span == 0:
        return (dial.exact,)
    if 0 < to_default / span < 1:
        shares = [factor * to_default / span for factor in _FACTORS]
    else:
        shares = [step / _EVEN for step in range(1, _EVEN)]
    return (dial.exact, *(dial.exact + share * span for share in shares if share < 1), dial.fast)


def grid(dials: Sequence[Dial], values: Mapping[str, Sequence[float]] | None = None) -> dict[str, tuple[float, ...]]:
    """Dial → the values that a walk tries, the exact value first.

    Args:
        values: values of some dials, in place of `levels`; the exact value is added.

    Raises:
        InputError: a dial does not exist, or a value is out of range or on the far side of the exact one.
    """
    unknown = set(values or {}) - {dial.name for dial in dials}
    Dials(tuple(dials)).values(dict.fromkeys(unknown, 0.0))  # its error names the nearest dial
    levels_of = {}
    for dial in dials:
        dial_values = (values or {}).get(dial.name)
        if dial_values is None:
            levels_of[dial.name] = levels(dial)
            continue
        for value in dial_values:
            Dials((dial,)).values({dial.name: value})
            if (value - dial.exact) * (dial.fast - dial.exact) < 0:
                raise InputError(
                    f"dial {dial.name!r}: {value:g} is not on the way from exact ({dial.exact:g}) to fast "
                    f"({dial.fast:g})",
                    hint="give values between the two",
                )
        levels_of[dial.name] = (dial.exact, *sorted({float(v) for v in dial_values} - {dial.exact}, key=_from(dial)))
    return levels_of


def _from(dial: Dial) -> Callable[[float], float]:
    return lambda value: abs(value - dial.exact)


def walk(
    values: Mapping[str, Sequence[float]],
    measure: Callable[[dict[str, float]], tuple[int, float]],
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[Place, Point]:
    """Measure every setting of a grid.

    Args:
        values: dial → values, from `grid`.
        measure: dials → FLOPs and score.
        progress: called with (what, done, total).

    Returns:
        Place in the grid → point, in lexicographic order; the grid has one axis for each dial.
    """
    report = progress or (lambda what, done, total: None)
    places = list(product(*(range(len(each)) for each in values.values())))
    points = {}
    for done, place in enumerate(places):
        report("walk", done, len(places))
        dials = {name: float(each[i]) for (name, each), i in zip(values.items(), place, strict=True)}
        flops, score = measure(dials)
        points[place] = Point(dials, flops, score)
    report("walk", len(places), len(places))
    return points


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats in FLOPs and score, most FLOPs first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.flops, -p.score)):
        if not front or point.score > front[-1].score:
            front.append(point)
    return front[::-1]


def cheapest(points: Sequence[Point], least: float) -> Point | None:
    """The point of fewest FLOPs whose score is at least `least`; None where no point reaches it."""
    return min((p for p in points if p.score >= least), key=lambda p: (p.flops, -p.score), default=None)


def measured_path(points: Mapping[Place, Point], max_drop: float | None = None) -> tuple[SpeedPoint, ...]:
    """The path of a walk: at speed 0 the exact setting, at 1 the fastest.

    Between its points, equal differences of speed are equal factors of FLOPs. Nothing between two points is measured.

    Args:
        points: the result of `walk`; the first is exact.
        max_drop: points of score (of 100) that the fastest setting may lose against the exact one.

    Raises:
        ModelError: no setting computes less than the exact one, or none within `max_drop` does.
    """
    chain = _chain(points, _end(points, max_drop))
    exact, last = chain[0], chain[-1]
    falling: list[Point] = []
    for point in chain[1:]:
        if last.flops <= point.flops < min([exact.flops, *(each.flops for each in falling)]) or point is last:
            falling.append(point)
    front = pareto(falling)
    saved = [math.log(exact.flops / max(point.flops, 1)) for point in front]
    return (
        SpeedPoint(0.0, exact.dials),
        *(SpeedPoint(each / saved[-1], point.dials) for each, point in zip(saved, front, strict=True)),
    )


def _end(points: Mapping[Place, Point], max_drop: float | None) -> Place:
    """The place of the fastest setting within `max_drop`; of several, the one farthest from exact."""
    exact = next(iter(points.values()))
    least = -math.inf if max_drop is None else exact.score - max_drop / 100
    allowed = [place for place, point in points.items() if point.score >= least and point.flops < exact.flops]
    if not allowed:
        limit = "" if max_drop is None else f" and loses at most {max_drop:g} points against it"
        raise ModelError(
            f"no setting of the dials computes less than the exact one{limit}, on these data",
            hint="the build keeps the path it has; give other data" + ("" if max_drop is None else ", or allow more"),
        )
    return min(allowed, key=lambda place: (points[place].flops, -sum(place)))


def _chain(points: Mapping[Place, Point], end: Place) -> list[Point]:
    """The staircase from the exact setting to `end` with the largest area below score over log FLOPs."""
    steps = [step for step in product((0, 1), repeat=len(end)) if any(step)]
    area: dict[Place, float] = {}
    previous: dict[Place, Place] = {}
    for place, point in points.items():
        if any(i > last for i, last in zip(place, end, strict=True)):
            continue
        area[place] = -math.inf if area else 0.0
        for step in steps:
            before = tuple(i - j for i, j in zip(place, step, strict=True))
            if before not in area:
                continue
            enclosed = area[before] + _enclosed(points[before], point)
            if enclosed > area[place]:
                area[place], previous[place] = enclosed, before
    places = [end]
    while places[-1] in previous:
        places.append(previous[places[-1]])
    return [points[place] for place in reversed(places)]


def _enclosed(a: Point, b: Point) -> float:
    """The area below score over log FLOPs between two points."""
    return max(0.0, math.log(max(a.flops, 1) / max(b.flops, 1))) * (a.score + b.score) / 2
