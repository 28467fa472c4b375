"""Precision in the graph: half-precision types where they suffice, and casts where types meet."""

from trimtab.passes.precision.precision import Precision

__all__ = ["Precision"]
