"""Calibration and evaluation data: texts or pairs of texts, one at a time from the file, or raw tensors.

| suffix (each also with .gz) | one sample per | fields |
| --- | --- | --- |
| .txt | line; blank lines are skipped | the text |
| .jsonl | line | "text" (or "sentence"), optional "text_pair" and "label"; `textfile` lists other names of pairs |
| .tsv | line, without quoting | the header's columns of the same names; without a header, the first column |
| .npz (no .gz) | first axis of its arrays | arrays named as the model's inputs; "label" for labels |

A label is a class (its number or name), a score, or in .jsonl a list of all class names that apply to the text. The
labels of .npz files are integers [samples], floats [samples] or [samples, scores], or ones and zeros [samples, labels].
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.compiler.builds.manifest import TensorInfo
from trimtab.compiler.data.arrays import read_npz
from trimtab.compiler.data.textfile import Example, Label, read_texts
from trimtab.compiler.data.texts import Text
from trimtab.compiler.data.tokenizer import load_tokenizer
from trimtab.compiler.fixed_shapes import fixed_batch, fixed_tokens
from trimtab.compiler.inputs import check_length, check_values
from trimtab.passes.errors import DataError, InputError, ModelError, short
from trimtab.passes.graph import load_graph
from trimtab.passes.graph.limits import Positions
from trimtab.passes.graph.ranges import packed_mask
from trimtab.passes.os_errors import no_file, unreadable

if TYPE_CHECKING:
    from trimtab.compiler.sources import Source

T = TypeVar("T")

LABEL = "label"
"""The array of an .npz file that holds the samples' labels, unless the model has an input of that name."""

_SHOWN = 60  # characters of a text in messages
_WINDOW = 512  # samples that are sorted by length together; a constant, so that the order ignores the batch size


@dataclass(frozen=True)
class Dataset:
    """The samples of one file. All of them have been checked.

    Attributes:
        path: the file.
        sha256: hash of the unpacked content.
        count: number of samples.
        arrays: the arrays of an .npz file; None for other files.
    """

    path: Path
    sha256: str
    count: int
    arrays: Mapping[str, np.ndarray] | None = field(default=None, repr=False)

    @property
    def texts(self) -> Iterator[Example]:
        """Each (text or pair of texts, label or None), in the order of the file. Each access reads the file anew.

        Raises:
            DataError: the data are raw tensors.
        """
        if self.arrays is not None:
            raise DataError(f"{self.path}: holds tensors, where texts are needed", hint="give .txt, .jsonl or .tsv")
        return read_texts(self.path)

    def sample(self, samples: int, seed: int = 0) -> Iterator[Example]:
        """Draw at most `samples` texts uniformly without replacement, in the order in which `batches` takes them.

        Selection sampling (Knuth, The Art of Computer Programming, 3.4.2, algorithm S) draws them in one reading with
        constant memory. Each window of drawn texts is then sorted by length, so that batches need little padding.
        """
        chosen = _select(self.texts, self.count, samples, seed)
        while window := list(islice(chosen, _WINDOW)):
            yield from sorted(window, key=lambda example: _length(example[0]))

    def labels(self, samples: int, seed: int = 0) -> list[Label] | np.ndarray | None:
        """Labels in the order of `sample(samples, seed)`; for .npz, rows of the label array, or None without one."""
        if self.arrays is None:
            return [label for _, label in self.sample(samples, seed)]
        labels = self.arrays.get(LABEL)
        return None if labels is None else labels[list(_select(range(self.count), self.count, samples, seed))]

    def shown(self, place: int, samples: int, seed: int = 0) -> str:
        """Name in messages of sample `place` of `sample(samples, seed)`, or of `batches` with these arguments."""
        if self.arrays is not None:
            row = next(islice(_select(range(self.count), self.count, samples, seed), place, None))
            return f"sample {row}"
        text, _ = next(islice(self.sample(samples, seed), place, None))
        parts = text if isinstance(text, tuple) else (text,)
        return " with ".join(f'"{_shortened(part)}"' for part in parts)


def read_data(path: Path | str) -> Dataset:
    """Open a data file and check all of it.

    Raises:
        DataError: the file is missing, empty, not UTF-8, malformed, or of an unknown kind; names the file and the line.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise no_file(path, DataError, hint="give a .txt, .jsonl, .tsv or .npz file")
    if path.suffix.lower() == ".npz":
        return _read_arrays(path)
    digest = hashlib.sha256()
    count = sum(1 for _ in read_texts(path, digest.update))
    if not count:
        raise DataError(f"{path}: holds no text", hint="give a file with a text in each line")
    return Dataset(path, digest.hexdigest(), count)


def batches(
    dataset: Dataset,
    source: Source,
    batch_size: int = 16,
    max_tokens: int = 128,
    samples: int = 512,
    *,
    seed: int = 0,
    inputs: Sequence[gs.Tensor] | None = None,
    positions: Positions | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield feeds for the model from a random sample of the data. Equal arguments give equal feeds.

    Args:
        inputs: inputs of the model's graph; None reads them from the model.
        positions: limit of the model's positions: longer texts are cut, and longer tensors are refused.

    Yields:
        input name → array. Its first axis has at most `batch_size` samples, or the model's batch size if that is fixed.
        If the model's number of tokens is fixed, texts are cut and padded to it. Feeds of texts have `attention_mask`
        [batch, tokens] even if the graph has no such input, since padding must be known.

    Raises:
        DataError: the data do not fit the model's inputs.
        ModelError: the model has no tokenizer.
    """
    inputs = load_graph(source.onnx).inputs if inputs is None else inputs
    batch_size = fixed_batch(inputs) or batch_size
    if dataset.arrays is not None:
        arrays = fit_arrays(dataset, inputs)
        rows = list(_select(range(dataset.count), dataset.count, samples, seed))
        for start in range(0, len(rows), batch_size):
            feed = {name: array[rows[start : start + batch_size]] for name, array in arrays.items()}
            with _as_data_error(dataset):
                check_length(feed, positions)
            yield feed
        return
    feeds = text_feeds(source, inputs, min(max_tokens, positions.most) if positions is not None else max_tokens)
    examples = dataset.sample(samples, seed)
    while batch := list(islice(examples, batch_size)):
        yield feeds([text for text, _ in batch])


def check_inputs(dataset: Dataset, source: Source, inputs: Sequence[gs.Tensor], max_tokens: int) -> None:
    """Check that `dataset` gives the inputs of a model, before all of it is read.

    Raises:
        ModelError, DataError: `dataset` does not; says what is missing.
    """
    if dataset.arrays is not None:
        fit_arrays(dataset, inputs)
    else:
        text_feeds(source, inputs, max_tokens)(["a"])


def text_feeds(
    source: Source, inputs: Sequence[gs.Tensor], max_tokens: int
) -> Callable[[Sequence[Text]], dict[str, np.ndarray]]:
    """Return a function that turns a batch of texts or pairs into feeds, which `batches` describes.

    Raises:
        ModelError: the model has no tokenizer. The function raises DataError where the model has inputs that texts do
            not give.
    """
    if source.tokenizer is None:
        raise ModelError(
            f"{source.origin}: has no tokenizer, so texts cannot be fed to it", hint="give tensors as .npz"
        )
    tokenizer = load_tokenizer(source.tokenizer, source.max_tokens)
    model_inputs = {tensor.name: tensor for tensor in inputs}
    width = fixed_tokens(inputs)

    def feeds_of(texts: Sequence[Text]) -> dict[str, np.ndarray]:
        feeds = tokenizer.encode(texts, max_tokens, width=width)
        feeds["position_ids"] = np.broadcast_to(np.arange(feeds["input_ids"].shape[1]), feeds["input_ids"].shape)
        feeds |= {
            name: _no_past(tensor, len(texts)) for name, tensor in model_inputs.items() if name.startswith("past")
        }
        missing = [name for name in model_inputs if name not in feeds]
        if missing:
            raise DataError(f"{source.origin}: texts do not give the input {missing[0]!r}", hint="give tensors as .npz")
        return {"attention_mask": feeds["attention_mask"]} | {
            name: feeds[name].astype(tensor.dtype) for name, tensor in model_inputs.items()
        }

    return feeds_of


def _fits(shape: Sequence[int], input_shape: Sequence[int | str]) -> bool:
    """Whether an array's `shape` fits the model's `input_shape`. The first axis, that of the samples, is ignored."""
    return len(shape) == len(input_shape) and all(
        size == fixed
        for size, fixed in zip(shape[1:], input_shape[1:], strict=True)
        if isinstance(fixed, int) and fixed >= 0
    )


def _shortened(text: str) -> str:
    """The beginning of a text, on one line."""
    return short(" ".join(text[: 4 * _SHOWN].split()), _SHOWN)


def _length(text: Text) -> int:
    """Number of characters of a text, or of both texts of a pair, which a model reads one after the other."""
    return len(text) if isinstance(text, str) else sum(map(len, text))


def _no_past(tensor: gs.Tensor, samples: int) -> np.ndarray:
    """An empty cache of keys or values: [samples, heads, 0, head_dim], for a decoder that reads its text at once."""
    return np.zeros((samples, *(size if isinstance(size, int) else 0 for size in tensor.shape[1:])), tensor.dtype)


def _select(items: Iterable[T], count: int, samples: int, seed: int) -> Iterator[T]:
    """`samples` of the `count` items, in their order."""
    rng, left = random.Random(seed), min(samples, count)
    for position, item in enumerate(items):
        if rng.random() * (count - position) < left:
            left -= 1
            yield item
        if not left:
            return


def _read_arrays(path: Path) -> Dataset:
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    except OSError as error:
        raise unreadable(path, error, DataError) from error
    arrays = read_npz(path)
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        raise DataError(
            f"{path}: its arrays differ in the number of samples ({counts})",
            hint="save arrays whose first axes have one length",
        )
    for name, array in arrays.items():
        if array.ndim == 2 and len(array) and not array.size:  # an array with more axes may be a cache without a past
            raise DataError(
                f"{path}: array {name!r} has the shape {list(array.shape)}, so its samples are empty",
                hint="save samples that have values",
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError(f"{path}: array {name!r} holds NaN or Inf", hint="save finite numbers")
    count = next(iter(counts.values()), 0)
    if not count:
        raise DataError(f"{path}: holds no samples", hint="save at least one sample")
    return Dataset(path, digest.hexdigest(), count, arrays)


def with_labels(dataset: Dataset, inputs: Sequence[gs.Tensor]) -> list[gs.Tensor]:
    """Append the array of labels to `inputs`, if `dataset` has one that is no input of the model."""
    labels = (dataset.arrays or {}).get(LABEL)
    if labels is None or any(tensor.name == LABEL for tensor in inputs):
        return list(inputs)
    if labels.dtype.kind not in "biuf" or labels.ndim > 2:
        raise DataError(
            f"{dataset.path}: array {LABEL!r} is {labels.dtype} {list(labels.shape)}",
            hint="give integers [samples] for classes, floats [samples] for scores, ones and zeros [samples, labels]",
        )
    dtype = np.float64 if labels.dtype.kind == "f" else np.int64
    return [*inputs, gs.Variable(LABEL, dtype, ["batch", "labels"][: labels.ndim])]


def fit_arrays(dataset: Dataset, inputs: Sequence[gs.Tensor]) -> dict[str, np.ndarray]:
    """Check the arrays against the model's inputs and cast them to the inputs' types."""
    arrays = dict(dataset.arrays or {})
    names = [tensor.name for tensor in inputs]
    if set(arrays) != set(names):
        raise DataError(
            f"{dataset.path}: holds the arrays {sorted(arrays)}, but the model's inputs are {sorted(names)}",
            hint="save one array per input, under the input's name",
        )
    for tensor in inputs:
        array = arrays[tensor.name]
        if not np.can_cast(array.dtype, tensor.dtype, "same_kind"):
            raise DataError(
                f"{dataset.path}: array {tensor.name!r} is {array.dtype}, the model wants {tensor.dtype}",
                hint="save it with .astype(...)",
            )
        if tensor.shape is not None and not _fits(array.shape, tensor.shape):
            raise DataError(
                f"{dataset.path}: array {tensor.name!r} has shape {array.shape}, the model wants {list(tensor.shape)}",
                hint="save it in that shape; where there is a name, any size goes",
            )
        arrays[tensor.name] = array.astype(tensor.dtype, copy=False)
    packed = [mask for tensor in inputs if (mask := packed_mask(tensor))]
    with _as_data_error(dataset):
        check_values([TensorInfo.of(tensor) for tensor in inputs], arrays, packed)
    return arrays


@contextmanager
def _as_data_error(dataset: Dataset) -> Iterator[None]:
    """Turn an InputError of the body into a DataError: the data hold inputs that the model does not take."""
    try:
        yield
    except InputError as error:
        raise DataError(f"{dataset.path}: {error.message}", hint=error.hint) from error
