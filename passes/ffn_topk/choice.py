"""Which blocks of one FFN are computed, and the measured recall and error."""

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
    """The chosen predictor of one FFN and its settings.

    Attributes:
        k: number of the most important blocks of a token that are wanted.
        take: number of blocks computed, k' of the paper.
        recall: share of the wanted blocks that are computed, on held-out states.
        shards: number of equal parts of the blocks. Each part takes the same number of its own best blocks.
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
        """Squared error of the FFN's outputs on held-out states, relative to their variance, without the rest map."""
        taken = np.repeat(self.computed(layer.held_out), self.predictor.block, 1)
        return layer.error((layer.h_held_out * taken) @ layer.down)

    def by_shards(self, neurons: int, block: int) -> dict[str, Any]:
        """Entries of the report: neurons that each shard takes, and the recall if wanted neurons were random."""
        local = self.take // self.shards
        expected = expected_recall(neurons // block, self.k, self.shards, local)
        return {"shards": self.shards, "of_each_shard": local * block, "expected_recall": round(expected, 4)}
