"""Perplexity of a decoder on real text, token by token, as in generation. This module needs numpy alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np


def perplexity(blocks: np.ndarray, begin: Callable[[], object], step: Callable[[int], Iterable[float]]) -> float:
    """exp of the mean negative log-likelihood of all tokens but the first of each block.

    Args:
        blocks: [n, tokens].
        begin: empties the cache.
        step: appends one token; returns the logits of the next.
    """
    total = 0.0
    for block in blocks:
        begin()
        for token, following in pairwise(block):
            logits = np.asarray(step(int(token)), np.float64)
            largest = logits.max()
            total += largest + np.log(np.exp(logits - largest).sum()) - logits[following]
    return float(np.exp(total / blocks[:, 1:].size))


def read(text: str | None, vocabulary: int, tokens: int, batch: int = 1) -> tuple[np.ndarray | None, np.ndarray]:
    """Blocks of real text, [n, tokens], of the .npy file `text`, and rows to time with, [batch, tokens].

    Without a file, rows have random tokens.
    """
    if text is not None:
        blocks = np.load(Path(text))
        return blocks, np.resize(blocks, (batch, blocks.shape[1]))
    return None, np.random.default_rng(0).integers(min(3, vocabulary - 1), vocabulary, (batch, tokens))
