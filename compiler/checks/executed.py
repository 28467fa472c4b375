"""What a setting of the dials computes on data: FLOPs, exits, tokens that stay, and how good the answers are."""

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
    """What was computed of all samples together.

    Attributes:
        cost: FLOPs, and the rows that nodes let pass.
        exits: number of layers → samples that ran as many; empty where the model does not tell.
        quality: beside the dense model; None where trimtab knows no use of the outputs.
    """

    cost: Cost
    exits: dict[int, int] = field(default_factory=dict)
    quality: Quality | None = None


class Execution:
    """Runs a model on samples of data, counting.

    Answers and counts come of one run of a copy of the graph in ONNX Runtime, whatever the target is.

    Attributes:
        feeds: the samples' batches.
        dense: the dense model's answers to each batch.

    Args:
        count: the compiled model.
        samples: of the data.
        feeds: all that `samples.feeds()` gives.
        dense: of the dense model.
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
            turned = dials.feeds(size_of(feed), settings, speed)
            cost, outputs = self._count.run({n: v for n, v in feed.items() if n in self._count.inputs} | turned)
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
        """FLOPs of all samples together, and the score of the answers' quality, as `frontier.walk` asks for them.

        Raises:
            ModelError: trimtab knows no use of the outputs, so nothing can be judged.
        """
        run = self(dials, settings)
        if run.quality is None:
            raise ModelError(
                "the outputs have no task that trimtab knows, so settings cannot be told apart by quality",
                hint="name an output logits, last_hidden_state or sentence_embedding",
            )
        return run.cost.flops, run.quality.score


def total(costs: Sequence[Cost]) -> Cost:
    """Of all runs of one model together; there is one at least."""
    found = costs[0]
    for cost in costs[1:]:
        found = found + cost
    return found


def size_of(feed: Mapping[str, np.ndarray]) -> int:
    """Samples in a batch."""
    return len(next(iter(feed.values())))
