"""Runs the segments of a model one after the other, and a decoder step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from trimtab.compiler.decoder_cache import LOGITS, pasts, present_of, step_feeds
from trimtab.compiler.targets.base import Runner, Steps
from trimtab.compiler.targets.segmented.hook import Hook
from trimtab.compiler.targets.segmented.route import Route
from trimtab.compiler.targets.segmented.segment import Segment, Values
from trimtab.passes.errors import TargetError


class SegmentedRunner(Runner):
    """A model in one or several segments. Values stay on the device of the segment that computes them.

    Args:
        segments: the segments in the order in which they run, all of one kind.
        inputs, outputs: names of the whole model's inputs and outputs.
        hook: runs between two segments.
        lock: locked during a call, for runtimes that only one thread at a time may use.

    Attributes:
        route: the tensors that each segment reads and passes on.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        hook: Hook | None = None,
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.segments, self.hook = list(segments), hook or Hook()
        self.lock: AbstractContextManager[Any] = lock or nullcontext()
        self.route = Route.of(
            [(segment.inputs, segment.outputs) for segment in segments],
            inputs,
            outputs,
            between=[self.hook.reads(number) for number in range(len(segments))],
            companions=self.hook.companions,
        )
        self.hook.check(self.route)
        self.inputs, self.outputs = self.route.inputs, self.route.outputs
        self._names = frozenset(self.inputs)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if inputs.keys() != self._names:
            raise TargetError(
                f"could not run the model: it takes the inputs {', '.join(self.inputs)}, not {', '.join(inputs)}"
            )
        with self.lock:
            hook = self.hook.begin(self.route)
            values = self.advance(self.segments, dict(inputs), hook)
            return hook.results(self.segments[0], values, self.outputs)

    def advance(self, segments: Sequence[Segment], values: Values, hook: Hook) -> Values:
        """Run `segments`, the runner's own or those of a generation, on `values`.

        Returns:
            The tensors that are in use at the end.

        Raises:
            TargetError: a segment failed.
        """
        for number, (segment, leg) in enumerate(zip(segments, self.route.legs, strict=True)):
            values |= segment.run({name: values[name] for name in segment.inputs})
            remaining = hook.after(number, segment, values)
            if remaining is None:
                break
            values = remaining
            for name in leg.drops:
                values.pop(name, None)
        return values

    def steps(self, batch: int, length: int) -> Steps:
        if not pasts(self.inputs):
            return super().steps(batch, length)
        return SegmentedSteps(self, batch, length)

    def close(self) -> None:
        with self.lock:
            for segment in self.segments:
                segment.close()


class SegmentedSteps(Steps):
    """A generation in segments, each with the part of the cache that its attention reads."""

    def __init__(self, runner: SegmentedRunner, batch: int, length: int) -> None:
        self._runner = runner
        self._segments: list[Segment] = []
        self._past: Values = {}  # the parts of the cache that no op updates in place
        with runner.lock:
            try:
                for segment in runner.segments:
                    own, past = segment.generation(batch, length)
                    self._segments.append(own)
                    self._past |= past
            except BaseException:
                self.close()
                raise

    def run(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, dials: Mapping[str, np.ndarray] | None = None
    ) -> np.ndarray:
        runner = self._runner
        feeds = step_feeds(input_ids, attention_mask, runner.inputs)
        with runner.lock:
            values = runner.advance(
                self._segments, {**feeds, **(dials or {}), **self._past}, runner.hook.begin(runner.route)
            )
            self._past = {name: values[present_of(name)] for name in self._past}
            return self._segments[0].host(values[LOGITS])

    def close(self) -> None:
        with self._runner.lock:
            self._past = {}
            for own, segment in zip(self._segments, self._runner.segments, strict=False):
                if own is not segment:
                    own.close()
