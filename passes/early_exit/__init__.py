"""early-exit: samples leave behind the layer that is sure of them, and the rest of the graph runs on those left."""

from trimtab.passes.early_exit.early_exit import EarlyExit

__all__ = ["EarlyExit"]
