"""The cheap head, a low-rank map of the last hidden states to logits, and the measured quality of its candidates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax
from scipy.stats import beta

from trimtab.passes.ffn_topk.importance import best_of_shards, smallest
from trimtab.passes.ffn_topk.predictor import low_rank

_ROWS = 64  # states worked on at a time: a row of logits is as long as the vocabulary
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Head:
    """logits = x W + b.

    Attributes:
        weight: W, [d_model, vocabulary].
        bias: b, [vocabulary] or None.
    """

    weight: np.ndarray
    bias: np.ndarray | None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        y: np.ndarray = x @ self.weight
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class CheapHead:
    """logits ≈ x A B + c.

    Attributes:
        left, right: A [d_model, rank] and B [rank, vocabulary].
        offset: c, [vocabulary], the mean of the map's residual plus half its variance. If the residual of a logit is
            normal, E exp(logit) = exp(cheap + σ² / 2), so the tail keeps its share of a softmax.
    """

    left: np.ndarray
    right: np.ndarray
    offset: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        logits: np.ndarray = x @ self.left @ self.right + self.offset
        return logits

    @classmethod
    def fit(cls, head: Head, states: np.ndarray, rank: int) -> CheapHead:
        """The map of least squared error on `states` [n, d_model], by reduced-rank regression."""
        left, right = low_rank(head.weight, states, np.ones(head.weight.shape[1], np.float32), rank)
        sums = np.zeros((2, right.shape[1]))
        for x in parts(states):
            rest = (head(x) - x @ left @ right).astype(np.float64)
            sums += rest.sum(0), np.square(rest).sum(0)
        mean = sums[0] / len(states)
        variance = np.maximum(sums[1] / len(states) - np.square(mean), 0)
        return cls(left, right, (mean + variance / 2).astype(np.float32))


@dataclass(frozen=True)
class LikeliestRanks:
    """Ranks of the likeliest token in the cheap head's order, on held-out states.

    Attributes:
        places: number of candidates per shard that each state needs to include the likeliest token.
    """

    places: np.ndarray

    def agreement(self, take: int) -> float:
        """Share of states whose likeliest token is among `take` candidates, and so is found."""
        return float((self.places <= take).mean())

    def miss_bound(self, take: int) -> float:
        """Upper bound of the probability of missing the likeliest token, at 95 % confidence (Clopper, Pearson 1934)."""
        count, missed = len(self.places), int((self.places > take).sum())
        return 1.0 if missed == count else float(beta.ppf(_CONFIDENCE, missed + 1, count - missed))

    def reaching(self, agreement: float) -> int:
        """The smallest number of candidates that includes the likeliest token in this share of the states."""
        return smallest(self.places, agreement - 1e-9)  # a count over a count: rounding must not ask for one more

    def least(self, miss: float) -> int | None:
        """The smallest number of candidates with a `miss_bound` of at most `miss`; None if no number has it."""
        for take in np.unique(self.places):
            if self.miss_bound(int(take)) <= miss:
                return int(take)
        return None


def rank_likeliest(head: Head, cheap: CheapHead, states: np.ndarray, shards: int = 1) -> LikeliestRanks:
    """The rank of the likeliest token among the cheap head's candidates, for each state.

    Args:
        shards: neighbouring parts of the vocabulary. Each part has its own candidates.
    """
    places = []
    for x in parts(states):
        best, guess = head(x).argmax(-1)[:, None], cheap(x)
        own = np.arange(guess.shape[1]) // (guess.shape[1] // shards) == best // (guess.shape[1] // shards)
        places.append((own & (guess > np.take_along_axis(guess, best, 1))).sum(-1) + 1)
    return LikeliestRanks(np.concatenate(places))


def chosen_often(cheap: CheapHead, states: np.ndarray, take: int, shards: int = 1) -> np.ndarray:
    """Share of the states whose `take` candidates include each token, [vocabulary]; shards as for `rank_likeliest`."""
    count = sum(best_of_shards(cheap(x), take // shards, shards).sum(0) for x in parts(states))
    return count / len(states)


def divergence(head: Head, cheap: CheapHead, states: np.ndarray, take: int, shards: int = 1) -> float:
    """Mean KL(dense ‖ approximate) of the predicted distributions, in nats, with `take` exact candidates.

    Args:
        shards: parts of the vocabulary. Each part has the same number of candidates.
    """
    total, local = 0.0, take // shards
    for x in parts(states):
        exact, mixed = (y.reshape(len(x) * shards, -1) for y in (head(x), cheap(x)))
        rows = np.argpartition(-mixed, local - 1, axis=1)[:, :local]
        np.put_along_axis(mixed, rows, np.take_along_axis(exact, rows, 1), 1)
        p, q = (log_softmax(y.reshape(len(x), -1).astype(np.float64), -1) for y in (exact, mixed))
        total += float((np.exp(p) * (p - q)).sum())
    return total / len(states)


def parts(states: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(states), _ROWS):
        yield states[start : start + _ROWS]
