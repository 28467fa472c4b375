"""Task quality on a data file: both models run on its samples, and labels are used where the data have them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.compiler.checks.perplexity import measure_perplexity
from trimtab.compiler.checks.quality import Quality, measure_quality
from trimtab.compiler.data import Dataset, Label, Text, batches, label_values, with_labels
from trimtab.compiler.feeds import Run, within
from trimtab.compiler.progress import Progress
from trimtab.compiler.sources import Source
from trimtab.compiler.task import Task, find_task
from trimtab.compiler.workload import Workload
from trimtab.passes.errors import DataError
from trimtab.passes.graph.positions import find_positions


class Samples:
    """Samples of a data set as inputs of a model, with their labels and queries.

    Texts have labels of their own; the labels of tensors are an array "label" that is no input of the model.

    Attributes:
        count: number of samples.
        task: task of the model; None where trimtab knows none.

    Args:
        graph: graph of the dense model.
        workload: bounds of the batches' sizes.
        samples: maximum number of samples of the data; None for all.
        seed: seed of the sampling.
        task: task of the model; by default the task that its graph and the source's `head` imply.
        batch: samples in a batch; by default the workload's opt one.

    Raises:
        DataError: the labels do not fit the task.
    """

    def __init__(
        self, graph: gs.Graph, workload: Workload, source: Source, dataset: Dataset, *, samples: int | None = None,
        seed: int = 0, task: Task | None = None, batch: int | None = None,
    ) -> None:  # fmt: skip
        self.task = task or find_task(graph.inputs, graph.outputs, source.head)
        self.count = min(samples or dataset.count, dataset.count)
        self._source, self._dataset, self._seed = source, dataset, seed
        self._batch = batch or workload.batch[1]
        self._positions = find_positions(graph)
        self._longest = min(workload.tokens[2], source.max_tokens or workload.tokens[2])
        self._inputs = with_labels(dataset, graph.inputs)
        self._labels, self._queries = None, None
        if dataset.arrays is None or len(self._inputs) > len(graph.inputs):
            self._labels = _labels(dataset.labels(self.count, seed), self.task, source, graph)
        if self.task is not None and self.task.kind == "score" and dataset.arrays is None:
            self._queries = _queries(text for text, _ in dataset.sample(self.count, seed))

    def feeds(self, progress: Progress | None = None, what: str = "quality") -> Iterator[dict[str, np.ndarray]]:
        """The batches. Batches of texts have `attention_mask` [batch, tokens] beside the model's inputs.

        Args:
            what: name of the work, for `progress`.

        Raises:
            DataError: the data do not fit the model.
        """
        report, done = progress or (lambda what, done, total: None), 0
        for feed in batches(
            self._dataset,
            self._source,
            self._batch,
            self._longest,
            self.count,
            seed=self._seed,
            inputs=self._inputs,
            positions=self._positions,
        ):
            report(what, done, self.count)
            yield feed
            done += len(next(iter(feed.values())))
        report(what, self.count, self.count)

    def quality(self, feeds: Iterable[Mapping[str, np.ndarray]], dense: Run, compiled: Run) -> Quality:
        """Task quality of both models on `feeds`: all batches of `feeds()`, in order.

        Raises:
            ModelError: no output has a task that trimtab knows.
            TargetError: a model gives NaN or Inf.
        """
        if self.task is not None and self.task.kind == "text":  # a decoder with its cache
            return measure_perplexity(feeds, dense, compiled)
        names = self._source.labels
        return measure_quality(feeds, dense, compiled, self._labels, task=self.task, names=names, queries=self._queries)


def check_quality(
    dense: Run,
    compiled: Run,
    graph: gs.Graph,
    workload: Workload,
    source: Source,
    dataset: Dataset,
    *,
    samples: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    task: Task | None = None,
) -> Quality:
    """Task quality of both models on `dataset`, in batches within `workload`. Arguments are those of `Samples`.

    Raises:
        DataError: the data do not fit the model, or the labels do not fit its task.
        ModelError: no output has a task that trimtab knows.
    """
    chosen = Samples(graph, workload, source, dataset, samples=samples, seed=seed, task=task)
    both = within(dense, graph, workload), within(compiled, graph, workload)
    return chosen.quality(chosen.feeds(progress), *both)


def check_labels(dataset: Dataset, task: Task | None, source: Source, graph: gs.Graph, needed: bool) -> list[str]:
    """Check the labels of `dataset` before long work.

    Args:
        needed: whether a limit on the loss against labels needs them.

    Returns:
        A warning where some samples lack a label: then no labels are used.

    Raises:
        DataError: the labels do not fit the task, or are missing where they are needed.
    """
    labels = dataset.labels(dataset.count)
    missing = dataset.count if labels is None else sum(label is None for label in labels)
    labelled = task is not None and task.kind in ("classes", "labels", "score")
    if needed and not (labelled and missing == 0):
        why = "without labels for all samples" if labelled else "for a model whose task has no labels"
        raise DataError(
            f"{dataset.path}: what is lost against labels (--max-drop) cannot be judged {why}",
            hint="give labelled data" if labelled else "--min-quality limits the distance from the dense model",
        )
    try:
        _labels(labels, task, source, graph)
    except DataError as error:
        raise DataError(f"{dataset.path}: {error.message}", hint=error.hint) from error
    if labelled and 0 < missing < dataset.count:
        return [f"{missing} of {dataset.count} samples of {dataset.path} have no label, so labels are not used"]
    return []


def _labels(
    labels: list[Label] | np.ndarray | None, task: Task | None, source: Source, graph: gs.Graph
) -> np.ndarray | None:
    if task is None or labels is None:
        return None
    shape = next(tensor.shape for tensor in graph.outputs if tensor.name == task.output)
    width = shape[-1] if shape and isinstance(shape[-1], int) else None
    return label_values(labels, task, source.labels, width)


def _queries(texts: Iterable[Text]) -> list[int] | None:
    """A number for each pair, equal for pairs with the same first text; None where texts are no pairs."""
    numbers: dict[str, int] = {}
    queries = []
    for text in texts:
        if not isinstance(text, tuple):
            return None
        queries.append(numbers.setdefault(text[0], len(numbers)))
    return queries
