"""How much of a training run is over, by time or by steps, and the learning rate that follows it."""

from __future__ import annotations

import math
import time

_WARM_UP = 0.05  # of the schedule
_CHECKS = 10  # times the held-out samples are looked at, besides the beginning
_LOOKING = 0.1  # share of the time that looking may take


class Clock:
    """How much of a run is over.

    Args:
        minutes: time limit.
        steps: follow a number of steps instead, with `minutes` as a mere end.
        start: reading of the monotonic clock from which the time limit counts.
        look: seconds that a look at the held-out samples takes; the last one must still fit in.
        ran: seconds that the run had gone on when it was interrupted; `start` lies as far back.
    """

    def __init__(self, minutes: float, steps: int | None, start: float, look: float, ran: float = 0.0) -> None:
        self._steps, self._begin = steps, time.monotonic() - ran
        self._seconds = start + 60 * minutes - look - self._begin
        self.total = max(1, steps if steps is not None else round(60 * minutes))
        by_time = steps is None and self._seconds > 0
        self.every = max(1 / _CHECKS, look / self._seconds / _LOOKING) if by_time else 1 / _CHECKS
        """Share of the run from one look to the next."""

    @property
    def ran(self) -> float:
        """Seconds that the run has gone on."""
        return time.monotonic() - self._begin

    def at(self, step: int) -> float:
        """0 at the beginning; 1 and more is the end."""
        by_time = _share(time.monotonic() - self._begin, self._seconds)
        return by_time if self._steps is None or by_time >= 1 else _share(step, self._steps)


def _share(done: float, total: float) -> float:
    return done / total if total > 0 else 1.0


def schedule(at: float) -> float:
    """Factor of the learning rate at the share `at` of the schedule: up in a line, then down along a cosine."""
    if at < _WARM_UP:
        return max(at / _WARM_UP, 0.01)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (at - _WARM_UP) / (1 - _WARM_UP))))
