"""Sampling: the next token from logits, greedy or drawn at random among the likeliest."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict, Field


class Sampling(BaseModel):
    """How the next token is chosen.

    Attributes:
        temperature: logits are divided by it; 0 always takes the likeliest token.
        top_k: draw only among this many of the likeliest tokens; 0: among all.
        top_p: draw only among the fewest likeliest tokens whose probabilities sum to at least `top_p` (Holtzman et al.
            2020, nucleus sampling).
        seed: random seed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(0.0, ge=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(0, ge=0)

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """The probabilities to draw from, [batch, vocabulary] like `logits`, float64. Needs a temperature."""
        exact = logits.astype(np.float64)
        with np.errstate(over="ignore"):  # the likeliest are 0 and stay so, whatever a tiny temperature makes of others
            scaled = (exact - exact.max(-1, keepdims=True)) / self.temperature
        if 0 < self.top_k < scaled.shape[-1]:
            threshold = np.partition(scaled, -self.top_k, axis=-1)[:, -self.top_k, None]
            scaled = np.where(scaled < threshold, -np.inf, scaled)
        p = np.exp(scaled)
        p /= p.sum(-1, keepdims=True)
        if self.top_p < 1:
            order = np.argsort(-p, axis=-1, kind="stable")
            ranked = np.take_along_axis(p, order, -1)
            before = np.cumsum(ranked, -1) - ranked  # the token that crosses `top_p` is still included
            np.put_along_axis(p, order, np.where(before < self.top_p, ranked, 0), -1)
            p /= p.sum(-1, keepdims=True)
        return p

    def next(self, logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The next token of each row, [batch], from `logits` [batch, vocabulary]."""
        if self.temperature == 0:
            return logits.argmax(-1)
        cumulative = np.cumsum(self.probabilities(logits), -1)
        drawn = rng.random((len(logits), 1)) * cumulative[:, -1:]
        # The first token whose cumulative sum exceeds the draw; a token of probability 0 is never the first.
        return (cumulative > drawn).argmax(-1)
