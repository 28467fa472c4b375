"""A segment: a part of a model that one runtime runs in one call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

Values = dict[str, Any]
"""Tensor → numpy array, or what a segment has put out, where that lies."""


class Segment(ABC):
    """A part of a model, ready to run.

    Attributes:
        inputs: names of its inputs.
        outputs: names of its outputs.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @abstractmethod
    def run(self, feeds: Values) -> Values:
        """Its outputs, where the runtime leaves them; they may hold only until it runs again.

        Args:
            feeds: its inputs, and nothing else: numpy arrays, and what earlier segments of the same kind put out.

        Raises:
            TargetError: it does not take them, or fails.
        """

    @abstractmethod
    def host(self, value: Any) -> np.ndarray:
        """What a segment of this kind has put out, or an array, as an array that stays as it is."""

    def take(self, value: Any, rows: np.ndarray) -> Any:
        """The `rows` of `value` along its first axis, as something that `run` takes."""
        return self.host(value)[rows]

    def generation(self, batch: int, length: int) -> tuple[Segment, Values]:
        """This segment for one generation, with outputs of its own, and bound to those parts of the cache that stay.

        Args:
            batch: rows of the generation.
            length: the most tokens of a row.

        Returns:
            the segment, which is closed at the end unless it is this one, and what those of its past inputs start with
            that are handed on: what a step puts out as present is the past of the next.

        Raises:
            TargetError: it cannot make room for its part of the cache.
        """
        return self, {}

    def close(self) -> None:  # noqa: B027  (most have nothing to let go)
        """Let go of what it holds beyond this process. It may not run again."""
