"""Lowers ops that a target lacks to standard ops: the dialect, ONNX Runtime's own ops, TopK with a large k.

This is not a pass of recipes: a target applies it at build time, and the build also stores the original graph.
"""

from trimtab.passes.lower.lower import lower

__all__ = ["lower"]
