"""The cheap head: a low-rank map of the last hidden states to logits, and how well its candidates hold the truth."""

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
        weight: [d_model, vocabulary]; bias: [vocabulary] or None.
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
        offset: c, [vocabulary]. It makes up for the mean of what the map leaves out, and for half its variance: if the
            rest of a logit is normal, E exp(logit) = exp(cheap + σ² / 2). So the tail keeps its share of a softmax.
    """

    left: np.ndarray
    right: np.ndarray
    offset: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        found: np.ndarray = x @ self.left @ self.right + self.offset
        return found

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
class Found:
    """How the candidates of a cheap head hold the truth, on held-out states.

    Attributes:
        places: for each state, how many candidates, of each shard, are needed to have the likeliest token among them.
    """

    places: np.ndarray

    def agreement(self, take: int) -> float:
        """Share of states whose likeliest token is among `take` candidates, and so is found."""
        return float((self.places <= take).mean())

    def miss_bound(self, take: int) -> float:
        """Upper bound of the probability to miss the likeliest token, at 95 % confidence (Clopper and Pearson 1934)."""
        count, missed = len(self.places), int((self.places > take).sum())
        return 1.0 if missed == count else float(beta.ppf(_CONFIDENCE, missed + 1, count - missed))

    def reaching(self, agreement: float) -> int:
        """The fewest candidates that find the likeliest token in this share of the states."""
        return smallest(self.places, agreement - 1e-9)  # a count over a count: rounding must not ask for one more

    def least(self, miss: float) -> int | None:
        """The fewest candidates with a bound of at most `miss`; None if no number is enough to show it."""
        for take in np.unique(self.places):
            if self.miss_bound(int(take)) <= miss:
                return int(take)
        return None


def look(head: Head, cheap: CheapHead, states: np.ndarray, shards: int = 1) -> Found:
    """Where the likeliest token stands among the candidates of each state.

    Args:
        shards: neighbouring parts of the vocabulary, of which each has candidates of its own.
    """
    places = []
    for x in parts(states):
        best, guess = head(x).argmax(-1)[:, None], cheap(x)
        own = np.arange(guess.shape[1]) // (guess.shape[1] // shards) == best // (guess.shape[1] // shards)
        places.append((own & (guess > np.take_along_axis(guess, best, 1))).sum(-1) + 1)
    return Found(np.concatenate(places))


def chosen_often(cheap: CheapHead, states: np.ndarray, take: int, shards: int = 1) -> np.ndarray:
    """Share of the states that have each token among their `take` candidates, [vocabulary]; shards as for `look`."""
    count = sum(best_of_shards(cheap(x), take // shards, shards).sum(0) for x in parts(states))
    return count / len(states)


def divergence(head: Head, cheap: CheapHead, states: np.ndarray, take: int, shards: int = 1) -> float:
    """Mean KL(dense ‖ approximate) of the predicted distributions, in nats, with `take` exact candidates.

    Args:
        shards: parts of the vocabulary, of which each has as many of the candidates.
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
