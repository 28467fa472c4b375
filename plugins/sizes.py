"""Symbolic sizes of tensors, so that one rule infers shapes before a model runs and while an engine is built."""

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
    """A size that is known at run time, with an optional name. Arithmetic on a size gives an unnamed size."""

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
    """A size of an output that depends on data: the kernel counts it at run time.

    Attributes:
        name: name of the count. Outputs of a node with the same name have the same size.
        at_most: upper bound, an expression of the inputs' sizes.
    """

    name: str
    at_most: Any
