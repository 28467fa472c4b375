"""Wall-clock times of several runners that take turns, so that a slow minute of the machine slows all of them.

Two facts about CPUs shape this: the idle but spinning thread pool of one runtime slows the next one, and alternating
single runs makes each engine start with the other's weights in the cache. So runners take turns in short blocks, each
block begins with a rest and with untimed runs, and the order rotates from round to round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

REST_S = 0.02  # until threads of the previous runner stop spinning; ONNX Runtime's stop within some ms
LONGEST_S = 86400.0
"""A day, the longest timing of a command: without an end, nothing would be reported."""

_MIN_ROUNDS = 3  # even for slow runners: fewer blocks show no spread


@dataclass(frozen=True)
class Timing:
    """Times of one runner.

    Attributes:
        median_ms, p95_ms: median and 95th percentile of all timed runs, in milliseconds.
        samples: number of timed runs.
    """

    median_ms: float
    p95_ms: float
    samples: int


def interleave(
    runners: Mapping[str, Callable[[], object]], *, seconds: float, block: int = 5, warmup: int = 2, rest: float = 0.0
) -> dict[str, Timing]:
    """Time `runners` in turns: per round and runner, `warmup` untimed runs, then `block` timed ones.

    Args:
        runners: name → a call that does the whole work once.
        seconds: time budget for all runners together. The last round is finished, and at least three rounds run.
        block: timed runs of one runner before the next one's turn.
        warmup: untimed runs before each block.
        rest: pause before each block, in seconds; `REST_S` where a runner's threads spin after a run.
    """
    times: dict[str, list[int]] = {name: [] for name in runners}
    order = list(runners)
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < _MIN_ROUNDS or time.perf_counter() < end:
        for name in order:
            run = runners[name]
            time.sleep(rest)
            for _ in range(warmup):
                run()
            for _ in range(block):
                start = time.perf_counter_ns()
                run()
                times[name].append(time.perf_counter_ns() - start)
        order = order[1:] + order[:1]
        rounds += 1
    return {name: _timing(np.array(taken) / 1e6) for name, taken in times.items()}


def _timing(milliseconds: np.ndarray) -> Timing:
    median, p95 = np.percentile(milliseconds, (50, 95))
    return Timing(float(median), float(p95), len(milliseconds))
