"""Dials: numbers that turn a compiled model while it runs, from exact to fast.

Triton models carry this module, so it imports numpy alone.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.passes.errors import InputError

Setting = float | Sequence[float] | np.ndarray
"""Value of a dial or of the speed: one number for a whole call, or one per sample of the batch."""

_MIDDLE = 0.5  # speed at which the default path passes the dials' defaults


@dataclass(frozen=True)
class Dial:
    """A number that the user of a model sets for each call. In the graph it is a float32 input [batch].

    Attributes:
        name: name of the graph's input, in snake_case.
        meaning: effect of the dial, in one sentence.
        low, high: the smallest and the largest value.
        default: value in a call that does not set the dial.
        exact: the value at which the model computes what it did before the pass.
        fast: the value at the other end of the dial.
    """

    name: str
    meaning: str
    low: float
    high: float
    default: float
    exact: float
    fast: float

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name != self.name.lower():
            raise ValueError(f"dial {self.name!r}: a name is in snake_case")
        for value in (self.low, self.high, self.default, self.exact, self.fast):
            if not (math.isfinite(value) and self.low <= value <= self.high):
                raise ValueError(f"dial {self.name!r}: {value} is not within {self.low} and {self.high}")

    @property
    def range(self) -> str:
        """The range of values, for messages."""
        return f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class SpeedPoint:
    """Values of all dials at one speed."""

    speed: float
    dials: dict[str, float]


def straight_path(dials: Sequence[Dial]) -> tuple[SpeedPoint, ...]:
    """The path of a build without a measured path: exact at speed 0, defaults at 0.5, all dials fast at 1."""
    if not dials:
        return ()
    return (
        SpeedPoint(0.0, {dial.name: dial.exact for dial in dials}),
        SpeedPoint(_MIDDLE, {dial.name: dial.default for dial in dials}),
        SpeedPoint(1.0, {dial.name: dial.fast for dial in dials}),
    )


@dataclass(frozen=True)
class Dials:
    """The dials of a build, and the path that maps `speed` to their values.

    Attributes:
        path: points from speed 0, where every dial is exact, to speed 1. Values between two points are interpolated.
    """

    dials: tuple[Dial, ...] = ()
    path: tuple[SpeedPoint, ...] = ()

    def feeds(
        self, batch: int, dials: Mapping[str, Setting] | None = None, speed: Setting | None = None
    ) -> dict[str, np.ndarray]:
        """Inputs for the graph's dials.

        Args:
            batch: samples of the call.
            dials: name → value; they override `speed`.
            speed: 0 (exact) to 1 (fastest); without it, dials have their defaults.

        Returns:
            dial → [batch], float32.

        Raises:
            InputError: no dial has the name (the hint is the nearest), or a value is no number, out of range, or of
                another shape.
        """
        if speed is None:
            values: dict[str, np.ndarray] = {dial.name: np.array(dial.default) for dial in self.dials}
        else:
            values = self._at(_numbers("speed", speed, batch, 0.0, 1.0))
        dials_by_name = {dial.name: dial for dial in self.dials}
        if dials is not None and not isinstance(dials, Mapping):
            raise InputError(f"dials is {dials!r}, not a mapping", hint="give dials={name: number}")
        for name, value in (dials or {}).items():
            if name not in dials_by_name:
                raise InputError(f"unknown dial {name!r}", hint=self._suggest(name))
            values[name] = _numbers(f"dial {name!r}", value, batch, dials_by_name[name].low, dials_by_name[name].high)
        return {name: np.full(batch, value, np.float32) for name, value in values.items()}

    def values(self, dials: Mapping[str, float] | None = None, speed: float | None = None) -> dict[str, float]:
        """The values of `feeds` for one sample, as numbers."""
        return {name: float(value[0]) for name, value in self.feeds(1, dials, speed).items()}

    def exact(self, batch: int) -> dict[str, np.ndarray]:
        """Inputs that set every dial to its exact end."""
        return {dial.name: np.full(batch, dial.exact, np.float32) for dial in self.dials}

    def _at(self, speed: np.ndarray) -> dict[str, np.ndarray]:
        if not self.dials:
            raise InputError(
                "the engine has no dials, so its speed cannot be chosen",
                hint="leave `speed` out, or compile with a pass that has dials, such as early-exit",
            )
        speeds = [point.speed for point in self.path]
        return {
            dial.name: np.interp(speed, speeds, [point.dials[dial.name] for point in self.path]) for dial in self.dials
        }

    def _suggest(self, name: str) -> str:
        if not self.dials:
            return "this engine has none"
        names = [dial.name for dial in self.dials]
        near = difflib.get_close_matches(str(name), names, n=1)
        return f"did you mean {near[0]!r}?" if near else f"the engine has: {', '.join(names)}"


def _numbers(what: str, value: Setting, batch: int, low: float, high: float) -> np.ndarray:
    """`value` as float64, [] or [batch]."""
    try:
        array = np.asarray(value)
    except ValueError:  # lists of several lengths
        array = np.array(None)
    if array.dtype.kind not in "iuf" or isinstance(value, bool):
        raise InputError(f"{what} is {value!r}, not a number", hint=f"give a number from {low:g} to {high:g}")
    if array.shape not in ((), (1,), (batch,)):
        raise InputError(
            f"{what} has the shape {list(array.shape)} for {batch} samples", hint="give one number, or one per sample"
        )
    numbers = (array.reshape(()) if array.shape == (1,) else array).astype(np.float64)
    wrong = ~((numbers >= low) & (numbers <= high))  # NaN is neither
    if wrong.any():
        bad = float(np.atleast_1d(numbers)[np.atleast_1d(wrong)][0])
        raise InputError(f"{what} is {bad:g}", hint=f"give a number from {low:g} to {high:g}")
    return numbers
