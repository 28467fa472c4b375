"""Wall-clock times of several runners that take turns, so that a slow minute of the machine is shared by all.

Two facts about CPUs shape this: the idle but spinning thread pool of one runtime slows the next one, and alternating
single runs makes each engine start with the other's weights in the cache. So runners take turns in short blocks, each
block begins with a rest and with untimed runs, and the order rotates from round to round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

REST_S = 0.02  # after which threads of the runner before have stopped spinning, which ONNX Runtime's do within some ms
LONGEST_S = 86400.0
"""A day, which commands time at most: without an end, nothing would be reported."""

_MIN_ROUNDS = 3  # however slow the runners: a median of fewer blocks says nothing about spread


@dataclass(frozen=True)
class Timing:
    """How long one runner took.

    Attributes:
        median_ms, p95_ms: of all its timed runs, in milliseconds.
        samples: how many runs were timed.
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
        seconds: how long to go on, for all runners together; the round under way is finished, and three are run in any
            case.
        block: timed runs of one runner before the next one's turn.
        warmup: untimed runs before each block.
        rest: seconds before each block; `REST_S` where threads of a runner spin behind a run.
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
