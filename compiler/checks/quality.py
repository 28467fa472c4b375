"""Task quality of a compiled model beside its dense model: both run on data, and the task decides the comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.compiler.checks.kinds.classes import Agreement, Classification, compare_classes, compare_predictions
from trimtab.compiler.checks.kinds.embeddings import Embeddings, compare_embeddings, mean_pool
from trimtab.compiler.checks.kinds.labels import MultiLabel, compare_labels
from trimtab.compiler.checks.kinds.scores import Scores, compare_scores
from trimtab.compiler.checks.perplexity import Perplexity
from trimtab.compiler.feeds import Run
from trimtab.compiler.task import Task, find_task
from trimtab.passes.errors import DataError, ModelError, TargetError

Quality = Classification | MultiLabel | Scores | Embeddings | Agreement | Perplexity
"""`score` is compared with a limit on quality, `drop` with a limit on lost accuracy."""


def measure_quality(
    feeds: Iterable[Mapping[str, np.ndarray]],
    dense: Run,
    compiled: Run,
    labels: np.ndarray | Sequence[Any] | None = None,
    *,
    task: Task | None = None,
    names: Sequence[str] | None = None,
    queries: Sequence[int] | None = None,
) -> Classification | MultiLabel | Scores | Embeddings | Agreement:
    """Run both models over `feeds` and compare their predictions. Predictions are kept in memory, outputs are not.

    Args:
        feeds: batches of inputs; `attention_mask` marks padding.
        labels: label of each sample, in the order of `feeds`, as `label_values` gives them.
        task: task of both models; by default the task that the outputs imply.
        names: names of the classes.
        queries: query number of each sample, for rerankers.

    Raises:
        DataError: there are no samples, or the model does not have a label.
        ModelError: no output has a task that trimtab knows.
        TargetError: a model gives NaN or Inf.
    """
    theirs, ours, distances = [], [], []
    for feed in feeds:
        mask, outputs = feed.get("attention_mask"), dense(feed)
        task = task or _task_of(outputs)
        a, b = (_Part.of(task, each, mask, who) for each, who in ((outputs, "dense"), (compiled(feed), "compiled")))
        if a.values.shape != b.values.shape:
            raise ModelError(
                f"output {task.output!r} has the shape {list(b.values.shape)}, where the dense model gives "
                f"{list(a.values.shape)}",
                hint="compile the model again",
            )
        theirs.append(a.values)
        ours.append(b.values)
        distances.append(_distance(task, a, b))
    if task is None:
        raise DataError("the data holds no samples to measure quality on", hint="give a file with at least one sample")
    run_labels = _complete_labels(labels, sum(map(len, distances)))
    result = _compare(task, np.concatenate(theirs), np.concatenate(ours), run_labels, names, queries)
    return result.model_copy(update={"worst": int(np.argmax(np.concatenate(distances)))})


@dataclass(frozen=True)
class _Part:
    """The predictions of one model for a batch.

    Attributes:
        values: logits [samples, width], embeddings [samples, width], or ids of real tokens [tokens].
        rows: sample number of each entry of `values`.
    """

    values: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, task: Task, outputs: Mapping[str, np.ndarray], mask: np.ndarray | None, who: str) -> _Part:
        if task.output not in outputs:
            raise ModelError(
                f"the {who} model has no output {task.output!r}, on which its quality is measured",
                hint="compile the model again",
            )
        values = outputs[task.output]
        if not np.isfinite(values).all():
            raise TargetError(
                f"the {who} model gives NaN or Inf in output {task.output!r} on the data",
                hint="compile with milder options; validate without --data shows which outputs have NaN or Inf",
            )
        if task.kind == "states":
            values = mean_pool(values, mask)
        if task.kind in ("tokens", "text"):
            real = np.ones(values.shape[:-1], bool) if mask is None else mask != 0
            return cls(values.argmax(-1)[real], np.nonzero(real)[0])
        return cls(values, np.arange(len(values)))


def _task_of(outputs: Mapping[str, np.ndarray]) -> Task:
    @dataclass
    class Named:
        name: str
        shape: Any

    task = find_task((), [Named(name, value.shape) for name, value in outputs.items()])
    if task is None:
        raise ModelError(
            f"quality cannot be measured: trimtab knows no task for the outputs {', '.join(outputs)}",
            hint="name an output logits, last_hidden_state or sentence_embedding",
        )
    return task


def _distance(task: Task, dense: _Part, compiled: _Part) -> np.ndarray:
    """Distance between the two models on each sample of a batch, [samples], in a unit of the task."""
    a, b = dense.values, compiled.values
    if task.kind in ("tokens", "text"):
        counts = np.bincount(dense.rows)
        distance: np.ndarray = np.bincount(dense.rows, a != b, len(counts)) / np.maximum(counts, 1)
    elif task.kind in ("embedding", "states"):
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        distance = 1 - np.sum(a * b, axis=1) / np.maximum(lengths, np.finfo(np.float32).tiny)
    else:
        distance = np.abs(task.apply(a.astype(np.float64)) - task.apply(b.astype(np.float64))).max(-1)
    return distance


def _complete_labels(labels: np.ndarray | Sequence[Any] | None, samples: int) -> np.ndarray | None:
    """The labels of the samples that ran, if every sample has one."""
    if labels is None or any(label is None for label in labels[:samples]) or len(labels) < samples:
        return None
    return np.asarray(labels[:samples])


def _compare(
    task: Task,
    dense: np.ndarray,
    compiled: np.ndarray,
    labels: np.ndarray | None,
    names: Sequence[str] | None,
    queries: Sequence[int] | None,
) -> Classification | MultiLabel | Scores | Embeddings | Agreement:
    if task.kind in ("embedding", "states"):
        return compare_embeddings(dense, compiled)
    if task.kind == "score":
        theirs, ours = (task.apply(each.astype(np.float64)) for each in (dense, compiled))
        return compare_scores(theirs, ours, labels, queries, ranks_of=(dense, compiled))
    if task.kind == "labels":
        return compare_labels(task.apply(dense) > 0.5, task.apply(compiled) > 0.5, labels, names)
    if task.kind == "classes":
        classes = dense.shape[1]
        dense, compiled = dense.argmax(1), compiled.argmax(1)
        if labels is not None:
            if not ((labels >= 0) & (labels < classes)).all():
                raise DataError(
                    f"a label is outside 0..{classes - 1}, the classes of the model",
                    hint="number the classes from 0 as the model does, or give their names",
                )
            return compare_classes(dense, compiled, labels, names)
    return compare_predictions(dense, compiled, names)
