"""Sizes of tensors that are no numbers yet, so that one rule tells shapes before a model runs and while it is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Counted", "Shapes", "Size"]

Shapes = Mapping[str, Sequence[Any] | None]
"""Input → its shape, None where it is not given or not known. Sizes are integers, or what computes like integers with
+ - * // and >, which is 1 where it holds: `Size` here, expressions of TensorRT in `plugins/tensorrt`."""


@dataclass(frozen=True)
class Size:
    """A size that is known when the model runs: by its name, if it has one. What changes a size leaves no name."""

    name: str | None = None

    def __add__(self, other: Any) -> Any:
        return self if other == 0 else Size()

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self if other == 0 else Size()

    def __rsub__(self, other: Any) -> Any:
        return Size()

    def __mul__(self, other: Any) -> Any:
        return 0 if other == 0 else self if other == 1 else Size()

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        return self if other == 1 else Size()

    def __gt__(self, other: Any) -> Any:
        return Size()


@dataclass(frozen=True)
class Counted:
    """A size of an output that hangs on data: the kernel counts it while it runs.

    Attributes:
        name: of what is counted. Outputs of a node that give the same one have the same size.
        at_most: a size of the inputs, or made of such, that it never exceeds.
    """

    name: str
    at_most: Any
