"""Symbolic sizes of TensorRT, known when an engine runs, with the arithmetic of integers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["Expression", "raw", "sizes_of"]


class Expression:
    """A `tensorrt.plugin.ShapeExpr` that also computes with integers on either side."""

    def __init__(self, expr: Any) -> None:
        self.expr = expr

    def __add__(self, other: Any) -> Any:
        return self if _is(other, 0) else Expression(self.expr + raw(other))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self if _is(other, 0) else Expression(self.expr - raw(other))

    def __rsub__(self, other: Any) -> Any:
        return Expression(_constant(other) - self.expr)

    def __mul__(self, other: Any) -> Any:
        return 0 if _is(other, 0) else self if _is(other, 1) else Expression(self.expr * raw(other))

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        return self if _is(other, 1) else Expression(self.expr // raw(other))

    def __rfloordiv__(self, other: Any) -> Any:
        return Expression(_constant(other) // self.expr)

    def __gt__(self, other: Any) -> Any:
        return Expression(_constant(other) < self.expr)

    def __lt__(self, other: Any) -> Any:
        return Expression(self.expr < raw(other))


def raw(size: Any) -> Any:
    """The size for TensorRT's API: its own expression, or an integer."""
    return size.expr if isinstance(size, Expression) else int(size)


def sizes_of(exprs: Iterable[Any]) -> list[Any]:
    """Sizes of a tensor's `shape_expr`; constants become integers."""
    return [expr.constant_value() if not expr.is_fake and expr.is_constant else Expression(expr) for expr in exprs]


def _is(other: Any, value: int) -> bool:
    return isinstance(other, int) and other == value


def _constant(value: Any) -> Any:
    from tensorrt.plugin import ShapeExpr

    return raw(value) if isinstance(value, Expression) else ShapeExpr(int(value))
