"""Task quality on a data file: both models over its samples, with their labels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.compiler.checks.perplexity import measure_perplexity
from trimtab.compiler.checks.quality import Quality, measure_quality
from trimtab.compiler.data import LABEL, Dataset, batches, class_number, with_labels
from trimtab.compiler.feeds import Run, within
from trimtab.compiler.phases import Progress
from trimtab.compiler.sources import Source
from trimtab.compiler.workload import Workload


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
) -> Quality:
    """Task quality of both models on `dataset`, run in batches that lie within `workload`.

    Labels are those of the texts; of tensors, the integers of an array "label" that is no input of the model.
    """
    count = min(samples or dataset.count, dataset.count)
    batch, longest = workload.batch[1], min(workload.tokens[2], source.max_tokens or workload.tokens[2])
    names, wanted = {tensor.name for tensor in graph.inputs}, with_labels(dataset, graph.inputs)
    labels: list[int | None] | None = None
    if dataset.arrays is None:
        labels = [class_number(label, source.labels) for _, label in dataset.sample(count, seed)]
    elif len(wanted) > len(names):
        labels = []

    report = progress or (lambda what, done, total: None)

    def feeds() -> Iterator[dict[str, np.ndarray]]:
        done = 0
        for feed in batches(dataset, source, batch, longest, count, seed=seed, inputs=wanted):
            report("quality", done, count)
            if labels is not None and len(wanted) > len(names):
                labels.extend(feed[LABEL].tolist())
            yield feed
            done += len(next(iter(feed.values())))
        report("quality", count, count)

    both = within(dense, names, workload), within(compiled, names, workload)
    if any(name.startswith("past") for name in names):  # a decoder with its cache
        return measure_perplexity(feeds(), *both)
    return measure_quality(feeds(), *both, labels)
