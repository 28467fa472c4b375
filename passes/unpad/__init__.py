"""unpad: an encoder computes only the real tokens of a batch."""

from trimtab.passes.unpad.unpad import Unpad

__all__ = ["Unpad"]
