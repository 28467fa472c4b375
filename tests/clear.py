"""Prompts whose answers leave no doubt: at no step are two tokens so close that float rounding could swap them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trimtab.compiler.targets.base import Runner

ROUNDING = 1e-3
"""Far above what two ways of computing the same logits differ by."""


def clear_prompts(
    runner: Runner, lengths: Sequence[int], count: int, words: tuple[int, int], rng: np.random.Generator
) -> list[list[int]]:
    """One random prompt of each of `lengths`, each token in `words` (first, last + 1), for `count` greedy tokens."""
    found = []
    for length in lengths:
        prompt = rng.integers(*words, length)
        while _margin(runner, prompt, count) < ROUNDING:
            prompt = rng.integers(*words, length)
        found.append(prompt.tolist())
    return found


def _margin(runner: Runner, prompt: np.ndarray, count: int) -> float:
    """How far the best token is ahead of the second, at the step where it is least."""
    steps, ids, least = runner.steps(1, len(prompt) + count), prompt[None], np.inf
    for step in range(count):
        logits = steps.run(ids, np.ones((1, len(prompt) + step), np.int64))[0, -1]
        second, best = np.argsort(logits)[-2:]
        least = min(least, float(logits[best] - logits[second]))
        ids = np.array([[best]])
    return least
