"""Graph rewrites. A pass is graph in, graph out; what it knows of the data comes from the Profile alone."""

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
"""Name → where its class is; imported when asked for."""

PASS_NAMES = tuple(_PASSES)


def pass_class(name: str) -> type[Pass]:
    """The class of the pass called `name`.

    Raises:
        RecipeError: there is none; names the nearest.
    """
    found: type[Pass] = import_named(name, _PASSES, "pass", "passes", RecipeError)
    return found


__all__ = ["PASS_NAMES", "Capability", "Left", "Pass", "PassContext", "PassResult", "pass_class", "run_passes"]
