"""Precision in the graph: half-precision types where they suffice, casts at the borders."""

from trimtab.passes.precision.precision import Precision

__all__ = ["Precision"]
