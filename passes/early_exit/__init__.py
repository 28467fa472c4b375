"""early-exit: samples leave after the first layer whose exit is sure; later layers compute the remaining samples."""

from trimtab.passes.early_exit.early_exit import EarlyExit

__all__ = ["EarlyExit"]
