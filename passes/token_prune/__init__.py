"""token-prune: tokens that receive little attention are removed behind the attention of a layer."""

from trimtab.passes.token_prune.token_prune import TokenPrune

__all__ = ["TokenPrune"]
