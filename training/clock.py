"""The elapsed share of a training run, by time or by steps, and the learning-rate schedule over it."""

from __future__ import annotations

import math
import time

_WARM_UP = 0.05  # share of the schedule
_CHECKS = 10  # evaluations on the held-out samples after the first one
_LOOKING = 0.1  # limit of the share of time spent on evaluations


class Clock:
    """Measures the elapsed share of a run.

    Args:
        minutes: time limit.
        steps: number of steps that the share is measured by instead; `minutes` then only limits the run.
        start: reading of the monotonic clock from which the time limit counts.
        look: seconds that an evaluation takes; the limit leaves time for the last one.
        ran: seconds that the run took before it was interrupted; the caller has moved `start` back by them.
    """

    def __init__(self, minutes: float, steps: int | None, start: float, look: float, ran: float = 0.0) -> None:
        self._steps, self._begin = steps, time.monotonic() - ran
        self._seconds = start + 60 * minutes - look - self._begin
        self.total = max(1, steps if steps is not None else round(60 * minutes))
        by_time = steps is None and self._seconds > 0
        self.every = max(1 / _CHECKS, look / self._seconds / _LOOKING) if by_time else 1 / _CHECKS
        """Share of the run between two evaluations."""

    @property
    def ran(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._begin

    def at(self, step: int) -> float:
        """Elapsed share of the run at `step`: 0 at the beginning, 1 or more at the end."""
        by_time = _share(time.monotonic() - self._begin, self._seconds)
        return by_time if self._steps is None or by_time >= 1 else _share(step, self._steps)


def _share(done: float, total: float) -> float:
    return done / total if total > 0 else 1.0


def schedule(at: float) -> float:
    """Factor of the learning rate at the share `at` of the schedule: up in a line, then down along a cosine."""
    if at < _WARM_UP:
        return max(at / _WARM_UP, 0.01)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (at - _WARM_UP) / (1 - _WARM_UP))))
