"""FFSplit: heavy hitters in one part, the rest, compressed, in the other."""

from trimtab.passes.ffn_split.split import FFNSplit

__all__ = ["FFNSplit"]
