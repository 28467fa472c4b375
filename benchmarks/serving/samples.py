"""The samples that are sent and run: texts of `tokens` tokens, one piece a word, and random ids of that length."""

from __future__ import annotations

import numpy as np

WORDS = [
    "the",
    "movie",
    "was",
    "good",
    "bad",
    "a",
    "of",
    "story",
    "and",
    "actors",
    "music",
    "scene",
    "plot",
    "end",
    "time",
    "film",
]
COUNT = 64


def texts(tokens: int) -> list[str]:
    """`COUNT` texts; two of their tokens are the special ones."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, tokens - 2)) for _ in range(COUNT)]


def tensors(rows: int, tokens: int) -> dict[str, np.ndarray]:
    """Inputs of MiniLM, [rows, tokens]."""
    ids = np.random.default_rng(0).integers(1000, 30000, (rows, tokens))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
