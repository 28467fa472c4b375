"""How well a decoder predicts real text, token by token, as it generates. Needs numpy alone."""

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
            most = logits.max()
            total += most + np.log(np.exp(logits - most).sum()) - logits[following]
    return float(np.exp(total / blocks[:, 1:].size))


def read(words: list[str], vocabulary: int, tokens: int) -> tuple[np.ndarray | None, np.ndarray]:
    """Blocks of real text, [n, tokens], of the file that `words` begins with, and one row to time with.

    Without a file the row is of random tokens.
    """
    if words:
        blocks = np.load(Path(words[0]))
        return blocks, blocks[0]
    return None, np.random.default_rng(0).integers(3, vocabulary, tokens)
