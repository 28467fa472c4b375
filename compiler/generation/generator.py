"""The generation loop: from prompts to tokens, one step at a time; the runtime stores the cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing

import numpy as np

from trimtab.compiler.counts import check_count
from trimtab.compiler.generation.sampling import Sampling
from trimtab.compiler.targets.base import Runner, Steps
from trimtab.passes.errors import InputError

NONE = -1
"""Stands for the token of a row that is finished."""


def generate(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Collection[int] = (),
    context: int | None = None,
    pad: int = 0,
    vocabulary: int | None = None,
    dials: Mapping[str, np.ndarray] | None = None,
) -> Iterator[np.ndarray]:
    """Continue all `prompts` in one batch.

    Args:
        prompts: token ids of each prompt.
        max_new_tokens: maximum number of new tokens per prompt.
        stop: tokens that end a row; they are yielded too.
        context: maximum number of tokens that the model takes, prompt and answer together.
        pad: token that pads shorter prompts.
        vocabulary: size of the vocabulary; None if it is unknown.
        dials: dials of the build, [prompts] each.

    Yields:
        The next token of every prompt, [prompts]; NONE for finished ones. The loop ends when all are finished.

    Raises:
        InputError: there are no prompts; a prompt is no list of tokens, is empty, leaves no room for an answer in the
            context, or has tokens outside the vocabulary; or `max_new_tokens` is no number of tokens.
    """
    _check(prompts, vocabulary)
    check_count("max_new_tokens", max_new_tokens)
    lengths = np.array([len(prompt) for prompt in prompts])
    if not len(prompts) or not lengths.min():
        raise InputError("a prompt has no tokens", hint="give at least one")
    longest = int(lengths.max())
    if context is not None and longest >= context:
        raise InputError(
            f"the prompt has {longest} tokens, and the model takes {context} with its answer", hint="shorten it"
        )
    room = max_new_tokens if context is None else min(max_new_tokens, context - longest)
    sampling = sampling or Sampling()
    rng, done = np.random.default_rng(sampling.seed), np.zeros(len(prompts), bool)
    with closing(runner.steps(len(prompts), longest + room)) as steps:
        ids = np.full((len(prompts), longest), pad, np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        mask = (np.arange(longest) < lengths[:, None]).astype(np.int64)
        logits = _last(steps, ids, mask, lengths - 1, dials)
        for step in range(room):
            token = sampling.next(logits, rng)
            yield np.where(done, NONE, token)
            done |= np.isin(token, list(stop))
            if done.all() or step == room - 1:
                return
            mask = np.concatenate([mask, np.ones_like(mask[:, :1])], 1)
            logits = _last(steps, token[:, None].astype(np.int64), mask, np.zeros_like(lengths), dials)


def _check(prompts: Sequence[Sequence[int]], vocabulary: int | None) -> None:
    for number, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise InputError(f"prompt {number} is not a list of token ids", hint="give tokenizer.prompts([text])")
        if ids.size and (ids.min() < 0 or (vocabulary is not None and ids.max() >= vocabulary)):
            wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
            valid_ids = "" if vocabulary is None else f", the model's tokens are 0 to {vocabulary - 1}"
            raise InputError(
                f"prompt {number} holds the token {wrong}{valid_ids}", hint="use the model's own tokenizer"
            )


def _last(
    steps: Steps, ids: np.ndarray, mask: np.ndarray, position: np.ndarray, dials: Mapping[str, np.ndarray] | None
) -> np.ndarray:
    """Logits of the token at `position` of each row, [batch, vocabulary]."""
    logits = steps.run(ids, mask, dials) if dials else steps.run(ids, mask)
    return logits[np.arange(len(ids)), position]
