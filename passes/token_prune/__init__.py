"""token-prune: removes tokens that receive little attention, after the attention of a layer."""

from trimtab.passes.token_prune.token_prune import TokenPrune

__all__ = ["TokenPrune"]
