"""Texts as training examples for transformers models: packed blocks of tokens, or padded texts with their classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trimtab.compiler.data import Dataset, Text, class_number
from trimtab.compiler.data.tokenizer import Tokenizer
from trimtab.passes.errors import DataError
from trimtab.training.held_out import SHARE, split

_AT_A_TIME = 256  # texts that are tokenized together
_JUDGED = 16384  # limit of a language model's held-out tokens: evaluating more takes minutes on a CPU


@dataclass(frozen=True)
class Examples:
    """The data of a Trainer.

    Attributes:
        train, held_out: training samples and held-out samples.
        collate: turns samples into the arguments of the model's forward, including labels.
        lengths: number of tokens of each training sample; None if all are equal.
    """

    train: Sequence[Any]
    held_out: Sequence[Any]
    collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]]
    lengths: np.ndarray | None = None

    def some(self, samples: int, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of the first training samples, sorted by length; the same at each call."""
        count = min(samples, len(self.train))
        order = np.arange(count) if self.lengths is None else np.argsort(self.lengths[:count], kind="stable")
        for i in range(0, count, batch_size):
            yield self.collate([self.train[int(place)] for place in order[i : i + batch_size]])


def packed(dataset: Dataset, tokenizer: Tokenizer, max_tokens: int, rng: np.random.Generator) -> Examples:
    """Concatenate texts and cut them into blocks of `max_tokens`, for next-token prediction.

    If the tokenizer adds no special tokens, its end-of-text token separates the texts.

    Raises:
        DataError: the texts fill fewer than one training block and one held-out block.
    """
    texts = [text for text, _ in dataset.texts]
    if isinstance(texts[0], tuple):
        raise DataError(f"{dataset.path}: pairs of texts, and language models learn from single ones", hint="join them")
    marked = tokenizer.encode([""])["input_ids"].size > 0
    between = [] if marked or not tokenizer.end_ids else [min(tokenizer.end_ids)]

    def blocks(numbers: np.ndarray) -> list[np.ndarray]:
        rows = [np.asarray([*row, *between]) for row in _rows([texts[i] for i in numbers], tokenizer)]
        stream = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        return list(stream[: len(stream) // max_tokens * max_tokens].reshape(-1, max_tokens))

    # in random order: the first samples, from which inputs are recorded, must not come from a few long texts only
    train, held_out = (
        [blocks_of[i] for i in rng.permutation(len(blocks_of))] for blocks_of in map(blocks, split(dataset, rng))
    )
    held_out = held_out[: max(1, _JUDGED // max_tokens)]
    if not train or not held_out:
        raise DataError(
            f"{dataset.path}: too little text for blocks of {max_tokens} tokens, of which {SHARE:.0%} are held out",
            hint="give more text, or smaller blocks (--max-tokens)",
        )

    def collate(some: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(np.stack(some).astype(np.int64))
        return {"input_ids": ids, "labels": ids}

    return Examples(train, held_out, collate)


def labelled(
    dataset: Dataset, tokenizer: Tokenizer, classes: Sequence[str] | None, count: int, max_tokens: int,
    rng: np.random.Generator,
) -> Examples:  # fmt: skip
    """Texts or pairs with their classes.

    Args:
        count: number of the model's classes.

    Raises:
        DataError: a text has no label, or a label that is none of the model's classes.
    """
    samples = [(text, class_number(label, classes)) for text, label in dataset.texts]
    for number, (_, label) in enumerate(samples, 1):
        if label is None or not 0 <= label < count:
            problem = "has no label" if label is None else f"has the label {label}, outside 0..{count - 1}"
            raise DataError(f"{dataset.path}: text {number} {problem}", hint="a classifier learns from labelled texts")
    train, held_out = ([samples[i] for i in numbers] for numbers in split(dataset, rng))

    def collate(some: Sequence[tuple[Text, int]]) -> dict[str, torch.Tensor]:
        feeds = tokenizer.encode([text for text, _ in some], max_tokens)
        feed_tensors = {name: torch.from_numpy(np.ascontiguousarray(value)).long() for name, value in feeds.items()}
        return feed_tensors | {"labels": torch.tensor([label for _, label in some])}

    lengths = np.array([len(row) for row in _rows([text for text, _ in train], tokenizer, max_tokens)])
    return Examples(train, held_out, collate, lengths)


def _rows(texts: Sequence[Text], tokenizer: Tokenizer, max_tokens: int | None = None) -> Iterator[np.ndarray]:
    for i in range(0, len(texts), _AT_A_TIME):
        feeds = tokenizer.encode(texts[i : i + _AT_A_TIME], max_tokens)
        for ids, mask in zip(feeds["input_ids"], feeds["attention_mask"], strict=True):
            yield ids[mask != 0]
