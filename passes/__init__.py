"""Graph rewrites. A pass takes a graph and changes it; all it knows about the data comes from the Profile."""

from __future__ import annotations

from trimtab.passes.contract import Capability, Left, Pass, PassContext, PassResult, run_passes
from trimtab.passes.errors import RecipeError
from trimtab.passes.registry import import_named

_PASSES = {
    "canonicalize": "trimtab.passes.canonicalize:Canonicalize",
    "ffn-split": "trimtab.passes.ffn_split:FFNSplit",
    "ffn-topk": "trimtab.passes.ffn_topk.topk:FFNTopK",
    "ffn-route": "trimtab.passes.ffn_route.route:FFNRoute",
    "ffn-threshold": "trimtab.passes.ffn_threshold.threshold:FFNThreshold",
    "head-topk": "trimtab.passes.head_topk.topk:HeadTopK",
    "unpad": "trimtab.passes.unpad:Unpad",
    "token-prune": "trimtab.passes.token_prune:TokenPrune",
    "early-exit": "trimtab.passes.early_exit:EarlyExit",
    "recover": "trimtab.passes.recover:Recover",
    "weight-only": "trimtab.passes.weight_only:WeightOnly",
    "dynamic-int8": "trimtab.passes.dynamic_int8:DynamicInt8",
    "static-int8": "trimtab.passes.static_int8:StaticInt8",
    "precision": "trimtab.passes.precision:Precision",
}
"""Pass name → module and class. `pass_class` imports the module."""

PASS_NAMES = tuple(_PASSES)


def pass_class(name: str) -> type[Pass]:
    """The class of the pass called `name`.

    Raises:
        RecipeError: no pass has this name; the hint is the nearest name.
    """
    named_class: type[Pass] = import_named(name, _PASSES, "pass", "passes", RecipeError)
    return named_class


__all__ = ["PASS_NAMES", "Capability", "Left", "Pass", "PassContext", "PassResult", "pass_class", "run_passes"]
