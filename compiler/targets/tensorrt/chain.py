"""Several engines as one: each takes what it reads of the inputs and of what earlier ones put out, where that lies."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trimtab.compiler.targets.base import Runner, Steps
from trimtab.compiler.targets.onnxruntime_steps import PAST, PRESENT, step_feeds
from trimtab.compiler.targets.tensorrt.info import EngineFile, ProfileInfo
from trimtab.passes.errors import TargetError

Values = dict[str, Any]
"""Tensor → numpy array, or what a stage has put out on its device."""


class Stage(ABC):
    """One engine, ready to run.

    Attributes:
        info: what is known of it.
    """

    def __init__(self, info: EngineFile) -> None:
        self.info = info

    @abstractmethod
    def run(self, feeds: Values, profile: int) -> Values:
        """Its outputs, on its device; they hold until it runs again.

        Args:
            feeds: its inputs, and nothing else.
            profile: number of the optimization profile, within which they lie.
        """

    @abstractmethod
    def fork(self) -> Stage:
        """The same engine with outputs of its own."""

    @abstractmethod
    def host(self, value: Any) -> np.ndarray:
        """A copy of what a stage has put out."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A tensor without elements, on the device."""

    def close(self) -> None:  # noqa: B027  (most have nothing to let go)
        """Let go of the engine."""


class Chain(Runner):
    """Runs `stages` one after the other; what they hand on stays on the device.

    Calls from several threads wait for each other, generations too: engines are used by one at a time.

    Args:
        inputs, outputs: of the whole model.
    """

    def __init__(self, stages: Sequence[Stage], inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self.stages, self.inputs, self.outputs = list(stages), tuple(inputs), tuple(outputs)
        self.lock = threading.RLock()  # the garbage collector may close a generation while its thread is in a call

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if set(inputs) != set(self.inputs):
            raise TargetError(f"the engine takes the inputs {', '.join(self.inputs)}, not {', '.join(inputs)}")
        with self.lock:
            values = self.advance(self.stages, dict(inputs))
            return {name: self.stages[0].host(values[name]) for name in self.outputs}

    def advance(self, stages: Sequence[Stage], values: Values) -> Values:
        """`values`, with all that `stages` make of them.

        Raises:
            TargetError: an input lies outside of every optimization profile; says which, and what it may be.
        """
        for stage in stages:
            feeds = {tensor.name: values[tensor.name] for tensor in stage.info.inputs}
            values |= stage.run(feeds, choose(stage.info, {name: tuple(v.shape) for name, v in feeds.items()}))
        return values

    def steps(self, batch: int, length: int) -> Steps:
        caches = [tensor for stage in self.stages for tensor in stage.info.inputs if tensor.name.startswith(PAST)]
        if not caches:
            return super().steps(batch, length)
        most = self._most_past(caches[0].name)
        if length - 1 > most:
            raise TargetError(
                f"the engine's cache takes {most} tokens, and {length} are wanted",
                hint=f"compile it with `workload: {{past: [0, n, {length}]}}`, or ask for fewer",
            )
        return ChainSteps(self, batch)

    def _most_past(self, name: str) -> int:
        profiles = [p for stage in self.stages for p in stage.info.profiles if name in p.shapes]
        return max(profile.shapes[name][2][2] for profile in profiles)

    def close(self) -> None:
        with self.lock:
            for stage in self.stages:
                stage.close()


class ChainSteps(Steps):
    """A decoder whose cache stays on the device.

    Present becomes past by turns: two sets of outputs, of which a step reads the one that the last step wrote.
    """

    def __init__(self, chain: Chain, batch: int) -> None:
        self._chain = chain
        self._turns: list[list[Stage]] = [[], []]
        self._count = 0
        self._past: Values = {}
        with chain.lock:
            try:
                self._open(batch)
            except BaseException:
                self.close()
                raise

    def _open(self, batch: int) -> None:
        for turn in self._turns:
            turn.extend(stage.fork() for stage in self._chain.stages)
        for stage in self._turns[0]:
            for tensor in stage.info.inputs:
                if tensor.name.startswith(PAST):
                    shape = (batch, tensor.shape[1], 0, tensor.shape[3])
                    self._past[tensor.name] = stage.empty(shape, tensor.dtype)

    def run(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        with self._chain.lock:
            return self._step(input_ids, attention_mask)

    def _step(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        chain, stages = self._chain, self._turns[self._count % 2]
        feeds = step_feeds(input_ids, attention_mask, chain.inputs)
        values = chain.advance(stages, {**feeds, **self._past})
        self._past = {name: values[PRESENT + name.removeprefix(PAST)] for name in self._past}
        self._count += 1
        return stages[0].host(values["logits"])

    def close(self) -> None:
        with self._chain.lock:
            self._past = {}
            for stages in self._turns:
                for stage in stages:
                    stage.close()


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
