"""Training batches: shuffled, with texts of similar length together, and a held-out part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.compiler.data import LABEL, Dataset, Label, class_number, fit_arrays, label_values, text_feeds, with_labels
from trimtab.compiler.sources import Source
from trimtab.compiler.task import Task
from trimtab.training.epoch import epoch
from trimtab.training.held_out import split

Feeds = dict[str, np.ndarray]

NO_LABEL = -100
"""Class of a sample without a label, which torch's cross-entropy ignores."""

_CLASSES = Task("classes", "logits", "softmax")
_AT_A_TIME = 256  # texts that are tokenized together when their lengths are taken


@dataclass(frozen=True)
class Batch:
    """Some samples.

    Attributes:
        feeds: inputs of the model.
        labels: label of each sample, as in `Samples`.
    """

    feeds: Feeds
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Samples:
    """The samples of a dataset, ready to feed.

    Attributes:
        train: indices of the training samples.
        held_out: indices of the held-out samples, in order of length.
        labels: class of each sample, [samples], or NO_LABEL; or float32 [samples, width], ones and zeros of labels, or
            scores, or NaN for a sample without a label.
    """

    train: np.ndarray
    held_out: np.ndarray
    labels: np.ndarray
    _lengths: np.ndarray
    _feeds: Callable[[np.ndarray], Feeds]

    def epochs(self, batch_size: int, rng: np.random.Generator) -> Iterator[Batch]:
        """Batches without end, each epoch in another order. The last, smaller batch of a pool is used too."""
        while True:
            for places in epoch(self._lengths[self.train], batch_size, rng):
                yield self._batch(self.train[places])

    def judged(self, batch_size: int) -> Iterator[Batch]:
        """Batches of the held-out samples."""
        for batch in self._batches(self.held_out, batch_size):
            yield self._batch(batch)

    def _batch(self, rows: np.ndarray) -> Batch:
        return Batch(self._feeds(rows), self.labels[rows])

    @staticmethod
    def _batches(rows: np.ndarray, batch_size: int) -> list[np.ndarray]:
        return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]


def read_samples(
    dataset: Dataset, source: Source, inputs: Sequence[gs.Tensor], *,
    max_tokens: int, rng: np.random.Generator,
    task: Task | None = _CLASSES, width: int | None = None,
) -> Samples:  # fmt: skip
    """Read a dataset and split it.

    Args:
        inputs: inputs of the model's graph.
        max_tokens: length at which texts are cut.
        task: the meaning of the labels; None: labels are not read.
        width: width of the logits.

    Raises:
        DataError: the data has fewer than two samples, or does not fit the model's inputs or classes.
    """
    train, held_out = split(dataset, rng)
    if dataset.arrays is not None:
        wanted = with_labels(dataset, inputs)
        arrays = fit_arrays(dataset, wanted)
        given: Sequence[Label] | np.ndarray = [None] * dataset.count
        if len(wanted) > len(inputs):
            given = arrays.pop(LABEL)
        lengths = np.zeros(dataset.count)

        def feeds(rows: np.ndarray) -> Feeds:
            return {name: array[rows] for name, array in arrays.items()}
    else:
        texts, of_each = zip(*dataset.texts, strict=True)
        given = list(of_each)
        of_texts = text_feeds(source, inputs, max_tokens)
        lengths = np.concatenate(
            [_tokens(of_texts(texts[i : i + _AT_A_TIME])) for i in range(0, len(texts), _AT_A_TIME)]
        )

        def feeds(rows: np.ndarray) -> Feeds:
            return of_texts([texts[i] for i in rows])

    labels = _labels(given, task, source.labels, width)
    return Samples(train, held_out[np.argsort(lengths[held_out], kind="stable")], labels, lengths, feeds)


def _labels(
    given: Sequence[Label] | np.ndarray, task: Task | None, names: Sequence[str] | None, width: int | None
) -> np.ndarray:
    """Labels in the format of `Samples`; a class below 0 means no label."""
    if task is None:
        return np.full(len(given), NO_LABEL)
    if task.kind == "classes":
        if isinstance(given, np.ndarray):
            numbers = label_values(given, task, names, None)
            assert numbers is not None
        else:
            classes = (class_number(label, names) for label in given)
            numbers = np.array([NO_LABEL if number is None else number for number in classes], np.int64)
        return np.where(numbers < 0, NO_LABEL, numbers)
    known = [place for place, label in enumerate(given) if label is not None]
    values = label_values(given if isinstance(given, np.ndarray) else [given[i] for i in known], task, names, width)
    labels = np.full((len(given), 1 if values is None else values.shape[1]), np.nan, np.float32)
    if values is not None:
        labels[known] = values
    return labels


def _tokens(feeds: Feeds) -> np.ndarray:
    """Number of tokens of each sample. Characters would predict it badly, and padding costs time."""
    lengths: np.ndarray = feeds["attention_mask"].sum(-1)
    return lengths
