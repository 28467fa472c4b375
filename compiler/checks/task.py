"""Task quality on a data file: both models over its samples, with their labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.compiler.checks.perplexity import measure_perplexity
from trimtab.compiler.checks.quality import Quality, measure_quality
from trimtab.compiler.data import Dataset, Label, Text, batches, label_values, with_labels
from trimtab.compiler.feeds import Run, within
from trimtab.compiler.phases import Progress
from trimtab.compiler.sources import Source
from trimtab.compiler.task import Task, find_task
from trimtab.compiler.workload import Workload
from trimtab.passes.errors import DataError


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
    """Task quality of both models on `dataset`, run in batches that lie within `workload`.

    Labels are those of the texts; of tensors, an array "label" that is no input of the model.

    Args:
        task: of the model; by default what its graph and the source's `head` tell.

    Raises:
        DataError: the data do not fit the model, or their labels its task.
        ModelError: no output that can be judged.
    """
    task = task or find_task(graph.inputs, graph.outputs, source.head)
    count = min(samples or dataset.count, dataset.count)
    batch, longest = workload.batch[1], min(workload.tokens[2], source.max_tokens or workload.tokens[2])
    names, wanted = {tensor.name for tensor in graph.inputs}, with_labels(dataset, graph.inputs)
    labels, queries = None, None
    if dataset.arrays is None or len(wanted) > len(names):
        labels = _labels(dataset.labels(count, seed), task, source, graph)
    if task is not None and task.kind == "score" and dataset.arrays is None:
        queries = _queries(text for text, _ in dataset.sample(count, seed))
    report = progress or (lambda what, done, total: None)

    def feeds() -> Iterator[dict[str, np.ndarray]]:
        done = 0
        for feed in batches(dataset, source, batch, longest, count, seed=seed, inputs=wanted):
            report("quality", done, count)
            yield feed
            done += len(next(iter(feed.values())))
        report("quality", count, count)

    both = within(dense, names, workload), within(compiled, names, workload)
    if task is not None and task.kind == "text":  # a decoder with its cache
        return measure_perplexity(feeds(), *both)
    return measure_quality(feeds(), *both, labels, task=task, names=source.labels, queries=queries)


def check_labels(dataset: Dataset, task: Task | None, source: Source, graph: gs.Graph, needed: bool) -> list[str]:
    """Check the labels of `dataset` before long work.

    Args:
        needed: a limit on what is lost against labels was given.

    Returns:
        A sentence, where some samples lack a label, so that the labels of the others are not used.

    Raises:
        DataError: labels that are not those of the task, or none where they are needed.
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
    _labels(labels, task, source, graph)
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
    """The number of each pair's first text; None where texts are no pairs."""
    numbers: dict[str, int] = {}
    found = []
    for text in texts:
        if not isinstance(text, tuple):
            return None
        found.append(numbers.setdefault(text[0], len(numbers)))
    return found
