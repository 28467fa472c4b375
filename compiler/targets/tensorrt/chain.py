"""Several engines as one: each is a segment, which chooses its optimization profile by its input shapes."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trimtab.compiler.decoder_cache import pasts
from trimtab.compiler.targets.base import Steps
from trimtab.compiler.targets.segmented.hook import Hook
from trimtab.compiler.targets.segmented.runner import SegmentedRunner
from trimtab.compiler.targets.segmented.segment import Segment, Values
from trimtab.compiler.targets.tensorrt.info import EngineFile, ProfileInfo
from trimtab.passes.errors import TargetError


class Stage(Segment):
    """One engine, ready to run. Its outputs stay on its device, and are valid until it runs again.

    Attributes:
        info: the engine's entry in engine.json.
    """

    def __init__(self, info: EngineFile) -> None:
        self.info = info
        self.inputs = tuple(tensor.name for tensor in info.inputs)
        self.outputs = tuple(tensor.name for tensor in info.outputs)

    def run(self, feeds: Values) -> Values:
        return self.infer(feeds, choose(self.info, {name: tuple(value.shape) for name, value in feeds.items()}))

    @abstractmethod
    def infer(self, feeds: Values, profile: int) -> Values:
        """The outputs for `feeds`, whose shapes are within the optimization profile number `profile`."""

    @abstractmethod
    def fork(self) -> Stage:
        """A stage of the same engine with outputs of its own."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A tensor without elements on the device."""

    def generation(self, batch: int, length: int) -> tuple[Segment, Values]:
        turns = Turns(self)
        try:
            return turns, {
                tensor.name: turns.stages[0].empty((batch, tensor.shape[1], 0, tensor.shape[3]), tensor.dtype)
                for tensor in self.info.inputs
                if pasts([tensor.name])
            }
        except BaseException:
            turns.close()
            raise


class Turns(Segment):
    """An engine in a generation, with two sets of outputs in turn.

    A run reads as past the present that the last run wrote to one set, and writes the other set.
    """

    def __init__(self, stage: Stage) -> None:
        self.inputs, self.outputs = stage.inputs, stage.outputs
        self.stages: list[Stage] = []
        try:
            self.stages.extend(stage.fork() for _ in range(2))
        except BaseException:
            self.close()
            raise

    def run(self, feeds: Values) -> Values:
        self.stages.reverse()
        return self.stages[0].run(feeds)

    def host(self, value: Any) -> np.ndarray:
        return self.stages[0].host(value)

    def close(self) -> None:
        for stage in self.stages:
            stage.close()


class Chain(SegmentedRunner):
    """Runs `stages` one after the other; tensors between them stay on the device.

    Calls and generations of several threads wait for each other: only one thread at a time may use an engine.

    Args:
        inputs, outputs: names of the whole model's inputs and outputs.
        hook: runs between two stages.
    """

    def __init__(
        self, stages: Sequence[Stage], inputs: Sequence[str], outputs: Sequence[str], *, hook: Hook | None = None
    ) -> None:
        self.stages = list(stages)
        # The garbage collector may close a generation while its thread is in a call.
        super().__init__(stages, inputs, outputs, hook=hook, lock=threading.RLock())

    def steps(self, batch: int, length: int) -> Steps:
        past_inputs = pasts(self.inputs)
        max_past = self._max_past(past_inputs[0]) if past_inputs else length
        if length - 1 > max_past:
            raise TargetError(
                f"the engine's cache takes {max_past} tokens, and {length} are asked for",
                hint=f"compile it with `workload: {{past: [0, n, {length}]}}`, or ask for fewer",
            )
        return super().steps(batch, length)

    def _max_past(self, name: str) -> int:
        profiles = [p for stage in self.stages for p in stage.info.profiles if name in p.shapes]
        return max(profile.shapes[name][2][2] for profile in profiles)


def choose(info: EngineFile, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The number of the narrowest profile that takes these shapes: the last one, as the general one is first.

    Raises:
        TargetError: no profile takes them; names an input that is out of range, and the range.
    """
    fits = [number for number, profile in enumerate(info.profiles) if _outside(profile, shapes) is None]
    if fits:
        return fits[-1]
    name = _outside(info.profiles[0], shapes)
    assert name is not None
    low, _, high = info.profiles[0].shapes[name]
    raise TargetError(
        f"input {name!r} has the shape {list(shapes[name])}, and the engine takes {list(low)} to {list(high)}",
        hint="sizes must be within the recipe's workload",
    )


def _outside(profile: ProfileInfo, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The first input whose shape is outside `profile`; None if all are inside."""
    for name, shape in shapes.items():
        if name in profile.shapes:
            low, _, high = profile.shapes[name]
            if len(shape) != len(low) or not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
                return name
    return None
