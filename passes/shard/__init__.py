"""One graph divided among ranks: each computes its share of the neurons and of the vocabulary, and they join."""

from trimtab.passes.shard.divide import Join, Rank, divide

__all__ = ["Join", "Rank", "divide"]
