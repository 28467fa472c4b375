"""unpad: an encoder computes the real tokens of a batch alone."""

from trimtab.passes.unpad.unpad import Unpad

__all__ = ["Unpad"]
