"""Which blocks of one FFN are computed, and how well that was seen to serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.passes.ffn_topk.importance import best_of_shards
from trimtab.passes.ffn_topk.predictor import Predictor
from trimtab.passes.ffn_topk.shards import expected_recall
from trimtab.passes.sampled_ffn import SampledFFN


@dataclass(frozen=True)
class Choice:
    """What was found for one FFN.

    Attributes:
        k: blocks wanted of each token; take: blocks computed, k' of the paper.
        recall: share of the wanted ones among those computed, on held-out states.
        shards: parts of the blocks, of which each takes its own best, all as many.
    """

    predictor: Predictor
    k: int
    take: int
    recall: float
    shards: int = 1

    def computed(self, x: np.ndarray) -> np.ndarray:
        """Which blocks the states x [tokens, d_model] compute, bool [tokens, blocks]."""
        return best_of_shards(self.predictor.scores(x), self.take // self.shards, self.shards)

    def error(self, layer: SampledFFN) -> float:
        """Squared error of the FFN's outputs on held-out states, relative to their variance, without a rest."""
        taken = np.repeat(self.computed(layer.held_out), self.predictor.block, 1)
        return layer.error((layer.h_held_out * taken) @ layer.down)

    def by_shards(self, neurons: int, block: int) -> dict[str, Any]:
        """For the report: neurons that each shard takes, and the recall if the wanted ones fell at random."""
        local = self.take // self.shards
        expected = expected_recall(neurons // block, self.k, self.shards, local)
        return {"shards": self.shards, "of_each_shard": local * block, "expected_recall": round(expected, 4)}
