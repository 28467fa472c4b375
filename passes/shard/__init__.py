"""Divides a graph among ranks: each computes its share of the neurons and of the vocabulary, and joins the results."""

from trimtab.passes.shard.divide import Join, Rank, divide

__all__ = ["Join", "Rank", "divide"]
