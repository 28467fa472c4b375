"""A segment: a part of a model that a runtime runs in one call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

Values = dict[str, Any]
"""Tensor → numpy array, or the output of a segment on its device."""


class Segment(ABC):
    """A part of a model, ready to run.

    Attributes:
        inputs: names of the segment's inputs.
        outputs: names of the segment's outputs.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @abstractmethod
    def run(self, feeds: Values) -> Values:
        """The outputs, on the runtime's device. They may be valid only until the segment runs again.

        Args:
            feeds: the inputs and nothing else: numpy arrays, and outputs of earlier segments of the same kind.

        Raises:
            TargetError: the segment does not take the inputs, or fails.
        """

    @abstractmethod
    def host(self, value: Any) -> np.ndarray:
        """An output of a segment of this kind, or an array, as a numpy array that later runs do not change."""

    def take(self, value: Any, rows: np.ndarray) -> Any:
        """The `rows` of `value` along its first axis, as something that `run` takes."""
        return self.host(value)[rows]

    def generation(self, batch: int, length: int) -> tuple[Segment, Values]:
        """This segment for one generation, with outputs of its own, bound to the parts of the cache updated in place.

        Args:
            batch: rows of the generation.
            length: maximum number of tokens of a row.

        Returns:
            The segment, which the caller closes at the end unless it is this one, and the initial values of the past
            inputs that are passed from step to step: the present of a step is the past of the next.

        Raises:
            TargetError: the segment cannot allocate its part of the cache.
        """
        return self, {}

    def close(self) -> None:  # noqa: B027  (most have nothing to release)
        """Release the segment's resources outside this process. The segment may not run again."""
