"""ONNX operators in torch, as far as transformers use them: one function per operator.

Inputs come by position (None for one left out) and attributes by their ONNX names, so that the table needs no adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trimtab.training.ops import attention, layout, math

OPS: dict[tuple[str, str], Callable[..., Any]] = {**math.OPS, **layout.OPS, **attention.OPS}
"""(domain, operator) → function."""

__all__ = ["OPS"]
