"""Measures what a setting of the dials computes on data: FLOPs, exits, tokens that stay, and task quality."""

from __future__ import annotations

from collections import Counter as Histogram
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from trimtab.compiler.checks.cost import Cost, Counter
from trimtab.compiler.checks.quality import Quality
from trimtab.compiler.checks.task import Samples
from trimtab.compiler.feeds import Run
from trimtab.passes.dials import Dials, Setting
from trimtab.passes.early_exit.early_exit import LAYERS_RUN
from trimtab.passes.errors import ModelError

Feeds = Sequence[Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Executed:
    """The work and quality of all samples together.

    Attributes:
        cost: FLOPs, and the rows that go on at nodes where some may leave.
        exits: number of layers → samples that ran as many; empty where the model does not report it.
        quality: task quality beside the dense model; None where trimtab knows no task for the outputs.
    """

    cost: Cost
    exits: dict[int, int] = field(default_factory=dict)
    quality: Quality | None = None


class Execution:
    """Runs a model on samples of data and counts its work.

    Outputs and counts come from one run of a copy of the graph in ONNX Runtime, whatever the target is.

    Attributes:
        feeds: the samples' batches.

    Args:
        count: counter of the compiled model.
        samples: samples of the data.
        feeds: all batches of `samples.feeds()`.
        dense: runs the dense model.
    """

    def __init__(self, count: Counter, samples: Samples, feeds: Feeds, dense: Run) -> None:
        self.feeds = feeds
        self._count, self._samples = count, samples
        self._dense = {id(feed): dense(feed) for feed in feeds} if samples.task is not None else {}

    def __call__(
        self, dials: Dials, settings: Mapping[str, Setting] | None = None, speed: Setting | None = None
    ) -> Executed:
        """Run all samples at one setting, given as `Dials.feeds` takes it.

        Raises:
            ModelError, TargetError: as `Samples.quality`.
        """
        costs: list[Cost] = []
        exits: Histogram[int] = Histogram()

        def run(feed: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
            dial_feeds = dials.feeds(size_of(feed), settings, speed)
            cost, outputs = self._count.run({n: v for n, v in feed.items() if n in self._count.inputs} | dial_feeds)
            costs.append(cost)
            exits.update(outputs.get(LAYERS_RUN, np.zeros(0, np.int64)).tolist())
            return outputs

        quality = None
        if self._samples.task is None:
            for feed in self.feeds:
                run(feed)
        else:
            quality = self._samples.quality(self.feeds, lambda feed: self._dense[id(feed)], run)
        return Executed(total(costs), dict(sorted(exits.items())), quality)

    def point(self, dials: Dials, settings: Mapping[str, Setting]) -> tuple[int, float]:
        """FLOPs of all samples together, and the score of the task quality, as `frontier.walk` needs them.

        Raises:
            ModelError: trimtab knows no task for the outputs, so quality cannot be measured.
        """
        run = self(dials, settings)
        if run.quality is None:
            raise ModelError(
                "the outputs have no task that trimtab knows, so settings cannot be compared by quality",
                hint="name an output logits, last_hidden_state or sentence_embedding",
            )
        return run.cost.flops, run.quality.score


def total(costs: Sequence[Cost]) -> Cost:
    """The cost of all runs of one model together; `costs` has at least one."""
    summed = costs[0]
    for cost in costs[1:]:
        summed = summed + cost
    return summed


def size_of(feed: Mapping[str, np.ndarray]) -> int:
    """Samples in a batch."""
    return len(next(iter(feed.values())))
