"""The pass `token-prune`: removes tokens that receive little attention, after the attention of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from pydantic import Field

from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.anatomy.model import Block
from trimtab.passes.contract import Left, Pass, PassContext, PassResult
from trimtab.passes.dials import Dial
from trimtab.passes.errors import ModelError, NotLearnedError, RecipeError
from trimtab.passes.graph import constant, insert
from trimtab.passes.graph.packed_batch import (
    offsets_of,
    packed_attentions,
    readers_behind,
    reread,
    rows_of,
    strangers,
    why_all,
)
from trimtab.passes.profile import Profile
from trimtab.plugins import KEEP_TOKENS, PACKED_ATTENTION, add_multi_output_node

DIAL = "prune"
_METHOD = "magic-pyramid"
_MAX_STRENGTH = 4.0  # limit of the dial, in multiples of the learned thresholds
_RECEIVED = [output.name for output in PACKED_ATTENTION.outputs].index("received")


class TokenPrune(Pass):
    """Removes tokens by the attention that they receive, averaged over heads and queries (LTP, arXiv 2107.00910).

    A layer attends to all tokens that enter it. The rest of the layer and later layers compute only the tokens that
    stay. The first token of a sample and the most important other token always stay.

    threshold mode: a token stays if its importance reaches the layer's threshold, which training has learned. The dial
    scales the thresholds. ratio mode: after each layer, the given share of each sample's tokens stays, the most
    important ones. The dial scales the share that is removed. The pass needs packed tokens, which `unpad` provides.
    """

    name: ClassVar[str] = "token-prune"
    summary: ClassVar[str] = "tokens that receive little attention are removed; a dial says how many"
    behind: ClassVar[tuple[str, ...]] = ("unpad",)
    reads_layers: ClassVar[bool] = True

    strength: float = Field(
        1.0, ge=0, le=_MAX_STRENGTH, description="default of the dial: 0 keeps all, 1 prunes as it was learned or given"
    )
    keep: tuple[float, ...] | None = Field(
        None,
        min_length=1,
        description="ratio mode: share of the tokens that enter a layer which stay behind it, one for each layer",
    )

    @property
    def ratio(self) -> bool:
        return self.keep is not None

    def dials(self) -> tuple[Dial, ...]:
        high = 1.0 if self.ratio else _MAX_STRENGTH
        what = "share of the tokens that goes, of what `keep` lets go" if self.ratio else "factor of all thresholds"
        return (Dial(DIAL, what, 0.0, high, min(self.strength, high), exact=0.0, fast=high),)

    def check_profile(self, profile: Profile | None, before: Sequence[Pass]) -> None:
        if self.keep is not None:
            if wrong := [share for share in self.keep if not 0 < share <= 1]:
                raise RecipeError(f"token-prune.keep: {wrong[0]:g} is no share", hint="give numbers over 0, at most 1")
            return
        if profile is None or "thresholds" not in profile.learned(_METHOD):
            where = "the profile holds" if profile is not None else "there is no profile, and so"
            raise NotLearnedError(f"{where} no thresholds learned by {_METHOD}", method=_METHOD)

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        """Prune behind the attention of each layer, in place.

        Raises:
            ModelError: the tokens are not packed, the layers are not those that thresholds were learned for, or
                tokens of all layers are needed later, as where the model answers for each token.
        """
        attentions = packed_attentions(graph, self.name, context.results)
        blocks = find_anatomy(graph).blocks
        settings = self._settings(context, len(blocks))
        if len(attentions) != len(blocks) or len(settings) != len(blocks):
            what = "shares are given" if self.ratio else "thresholds were learned"
            raise ModelError(
                f"{len(settings)} {what}, and the model has {len(blocks)} layers and {len(attentions)} attentions of "
                "packed tokens that were found"
            )
        dial = context.add_dial(graph, self.dials()[0])
        left: list[Left] = []
        needed: list[Left] = []  # layers all of whose tokens are needed later
        for block, attention, setting in zip(blocks, attentions, settings, strict=True):
            where = f"layer {block.layer}"
            if setting >= 1 if self.ratio else setting <= 0:
                left.append(Left(where, "its setting keeps every token"))
            elif reason := self._prune(graph, block, attention, dial, setting):
                needed.append(Left(where, reason))
                left.append(needed[-1])
        if needed and len(left) == len(blocks):
            raise ModelError(
                f"no layer of this model can be pruned; {needed[-1].where}: {needed[-1].why}",
                hint="take token-prune out of the recipe; unpad works without it",
            )
        details: dict[str, Any] = {"keep" if self.ratio else "thresholds": [round(float(s), 6) for s in settings]}
        return PassResult(self.name, len(blocks) - len(left), tuple(left), details)

    def _settings(self, context: PassContext, layers: int) -> np.ndarray:
        """One setting per layer: a threshold, or the share of tokens that stays."""
        if self.keep is not None:
            return np.array(self.keep * layers if len(self.keep) == 1 else self.keep, np.float64)
        return np.asarray(context.measured().learned(_METHOD)["thresholds"], np.float64)

    def _prune(self, graph: gs.Graph, block: Block, attention: gs.Node, dial: gs.Tensor, setting: float) -> str | None:
        """Remove tokens after the attention of `block`; returns the reason if tokens cannot be removed there."""
        name = f"{self.name}/layer.{block.layer}"
        x, context, offsets = block.x, attention.outputs[0], offsets_of(attention)
        behind = readers_behind(graph, context)
        own = {id(tensor): tensor for tensor in (x, context, offsets)}
        others = strangers(graph, behind, own, name)
        if others:
            return why_all(graph, behind, others[0])
        received = gs.Variable(f"{name}/received", np.float32, (context.shape or [None])[:1])
        attention.outputs = [context, *attention.outputs[1:_RECEIVED], received]
        limit = self._limit(graph, dial, setting, name)
        inputs = {"importance": received, "offsets": offsets, "threshold": limit}
        mode = "ratio" if self.ratio else "threshold"
        kept, kept_offsets = add_multi_output_node(graph, KEEP_TOKENS, inputs, f"{name}/keep", mode=mode)
        instead = {id(t): rows_of(graph, t, kept, f"{name}/{key}") for key, t in (("x", x), ("context", context))}
        reread(behind, instead | {id(offsets): kept_offsets})
        return None

    def _limit(self, graph: gs.Graph, dial: gs.Tensor, setting: float, name: str) -> gs.Tensor:
        """The limit that KeepTokens compares with, for each sample: threshold · dial, or 1 - (1 - share) · dial."""
        factor = 1 - setting if self.ratio else setting
        scale = constant(f"{name}/scale", np.array(factor, np.float32))
        scaled = insert(graph, "Mul", [dial, scale], f"{name}/scaled", dtype=np.float32)
        if not self.ratio:
            return scaled
        one = constant(f"{name}/all", np.array(1, np.float32))
        return insert(graph, "Sub", [one, scaled], f"{name}/share", dtype=np.float32)
