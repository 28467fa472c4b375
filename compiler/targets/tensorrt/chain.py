"""Several engines as one: each is a segment, which chooses its optimization profile by the shapes that it is given."""

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
    """One engine, ready to run. What it puts out lies on its device, and holds until it runs again.

    Attributes:
        info: what is known of it.
    """

    def __init__(self, info: EngineFile) -> None:
        self.info = info
        self.inputs = tuple(tensor.name for tensor in info.inputs)
        self.outputs = tuple(tensor.name for tensor in info.outputs)

    def run(self, feeds: Values) -> Values:
        return self.infer(feeds, choose(self.info, {name: tuple(value.shape) for name, value in feeds.items()}))

    @abstractmethod
    def infer(self, feeds: Values, profile: int) -> Values:
        """Its outputs for `feeds`, which lie within the optimization profile of the number `profile`."""

    @abstractmethod
    def fork(self) -> Stage:
        """The same engine with outputs of its own."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A tensor without elements, on the device."""

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
    """An engine in a generation: present becomes past by turns.

    Of two sets of outputs, a run reads the one that the last run wrote, and writes the other.
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
    """Runs `stages` one after the other; what they hand on stays on the device.

    Calls from several threads wait for each other, generations too: engines are used by one at a time.

    Args:
        inputs, outputs: of the whole model.
        hook: what is done between two stages.
    """

    def __init__(
        self, stages: Sequence[Stage], inputs: Sequence[str], outputs: Sequence[str], *, hook: Hook | None = None
    ) -> None:
        self.stages = list(stages)
        # The garbage collector may close a generation while its thread is in a call.
        super().__init__(stages, inputs, outputs, hook=hook, lock=threading.RLock())

    def steps(self, batch: int, length: int) -> Steps:
        known = pasts(self.inputs)
        most = self._most_past(known[0]) if known else length
        if length - 1 > most:
            raise TargetError(
                f"the engine's cache takes {most} tokens, and {length} are wanted",
                hint=f"compile it with `workload: {{past: [0, n, {length}]}}`, or ask for fewer",
            )
        return super().steps(batch, length)

    def _most_past(self, name: str) -> int:
        profiles = [p for stage in self.stages for p in stage.info.profiles if name in p.shapes]
        return max(profile.shapes[name][2][2] for profile in profiles)


def choose(info: EngineFile, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The number of the narrowest profile that takes inputs of these shapes: the last, as the general one is first.

    Raises:
        TargetError: there is none; says which input is outside, and what it may be.
    """
    fits = [number for number, profile in enumerate(info.profiles) if _outside(profile, shapes) is None]
    if fits:
        return fits[-1]
    name = _outside(info.profiles[0], shapes)
    assert name is not None
    low, _, high = info.profiles[0].shapes[name]
    raise TargetError(
        f"input {name!r} has the shape {list(shapes[name])}, and the engine takes {list(low)} to {list(high)}",
        hint="sizes must lie within the recipe's workload",
    )


def _outside(profile: ProfileInfo, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The first input that lies outside of `profile`."""
    for name, shape in shapes.items():
        if name in profile.shapes:
            low, _, high = profile.shapes[name]
            if len(shape) != len(low) or not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
                return name
    return None
