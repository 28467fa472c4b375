"""`trimtab validate`: is a build still the model it was compiled from, in numbers and at its task?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from pydantic import BaseModel, ConfigDict, Field

from trimtab.compiler.builds.build import Build, of_one_build
from trimtab.compiler.builds.writer import record
from trimtab.compiler.checks.bounds import large_errors, poor_quality
from trimtab.compiler.checks.compare import compare
from trimtab.compiler.checks.consistency import Consistency, batch_consistency
from trimtab.compiler.checks.corners import corners
from trimtab.compiler.checks.decoded import as_decoded
from trimtab.compiler.checks.dense import dense_source
from trimtab.compiler.checks.measure import OutputError, describe, in_brief
from trimtab.compiler.checks.peer_quality import peer_qualities, quality_rows, require_data
from trimtab.compiler.checks.peers import open_peer, peer_model
from trimtab.compiler.checks.quality import Quality
from trimtab.compiler.checks.task import check_labels, check_quality
from trimtab.compiler.data import Dataset, read_data
from trimtab.compiler.data.tokenizer import load_tokenizer
from trimtab.compiler.engine import load
from trimtab.compiler.feeds import Run, converting
from trimtab.compiler.inputs import check_sizes
from trimtab.compiler.progress import Progress
from trimtab.compiler.sources import Source
from trimtab.compiler.workload import Workload
from trimtab.passes.errors import DataError
from trimtab.passes.graph import load_graph
from trimtab.passes.graph.positions import find_positions

_TEXTS = 256  # whose tokens the corners of the workload are filled with


class Limits(BaseModel):
    """What a build must keep to; None is no limit. NaN, Inf and a batch that changes its samples are never allowed.

    Attributes:
        max_error: ‖y - y_dense‖ / ‖y_dense‖ of any output at any shape.
        min_quality: least `score` of the task's quality: accuracy, micro-F1, NDCG@10 or rank correlation, 0 to 1;
            without labels agreement with the dense model, or mean cosine of embeddings; dense by compiled perplexity.
        max_drop: points of accuracy, micro-F1, NDCG@10 or rank correlation below the dense model, which need labels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_error: float | None = Field(None, ge=0)
    min_quality: float | None = Field(None, ge=-1, le=1)
    max_drop: float | None = None

    def judged(self, quality: Quality | None) -> Iterator[str]:
        """What these limits ask, one phrase for each."""
        if self.max_error is not None:
            yield f"relative error at most {self.max_error:g}"
        if self.min_quality is not None and quality is not None:
            yield f"{quality.measured} at least {self.min_quality:g}"
        if self.max_drop is not None and quality is not None:
            yield f"{quality.measured} at most {self.max_drop:g} points below dense"


class Validation(BaseModel):
    """What was found.

    Attributes:
        outputs: the worst of each output.
        comparisons: every output at every shape.
        consistency: of samples alone and in a batch; empty where the workload has no batch.
        quality: on the data, if some were given.
        failures: one sentence for each limit that is broken.
        warnings: one sentence for each figure that is beyond a default bound, where no limit was given.
        judged: one phrase for each limit that was given.
        peers: the quality of each peer asked for, on the same samples.
        setting: dial → its value where the quality was measured, for builds that have dials.
    """

    model_config = ConfigDict(frozen=True)

    outputs: tuple[OutputError, ...]
    comparisons: tuple[OutputError, ...]
    consistency: tuple[Consistency, ...]
    quality: Quality | None
    failures: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    judged: tuple[str, ...] = ()
    peers: dict[str, Quality] = {}
    setting: dict[str, float] = {}

    @property
    def passed(self) -> bool | None:
        """Whether every limit is kept; None where no limit was given and nothing failed, so that nobody has judged."""
        if self.failures:
            return False
        return True if self.judged else None

    def summary(self) -> dict[str, Any]:
        """What measured.json keeps: flat, so that the report shows it as tables."""
        quality = self.quality.model_dump(mode="json", exclude={"worst"}) if self.quality else {}
        verdict: dict[str, Any] = {"passed": "no limit was given" if self.passed is None else self.passed}
        verdict |= {"judged": "; ".join(self.judged)} if self.judged else {}
        verdict |= {"warnings": "; ".join(self.warnings)} if self.warnings else {}
        verdict |= {"setting": ", ".join(f"{k} {v:g}" for k, v in self.setting.items())} if self.setting else {}
        errors = [
            {"output": what, "worst at": each.where} | each.model_dump(exclude={"output", "dims", "padded"})
            for what, each in in_brief(self.outputs, lambda each: each.severity)
        ]
        shown = [{key: value for key, value in row.items() if value is not None} for row in errors]
        beside = {"peers": quality_rows(self.quality, self.peers)} if self.quality and self.peers else {}
        return verdict | quality | {"outputs": shown} | beside


@of_one_build
def validate(
    build: Build,
    *,
    data: Path | None = None,
    dense: Path | None = None,
    samples: int | None = None,
    limits: Limits = Limits(),  # noqa: B008  (frozen)
    peers: Sequence[str] = (),
    peer_data: Path | None = None,
    threads: int | None = None,
    seed: int = 0,
    dials: Mapping[str, float] | None = None,
    speed: float | None = None,
    progress: Progress | None = None,
) -> Validation:
    """Compare the engine of `build` with its dense model, and record what was found beside it.

    The dense model runs in ONNX Runtime on the CPU, the engine on its own target. A build with dials is judged at its
    task as it runs, and its numbers are compared at the exact end of its dials, unless a setting is asked for: what is
    left out on the way to an answer is no error of the graph.

    Args:
        data: held-out data to measure the task quality on.
        dense: the dense ONNX file; by default the one that the build was compiled from.
        samples: of the data, at most; None for all.
        peers: engines of the dense model whose quality is measured beside the build's.
        peer_data: what peers that are calibrated statically are calibrated on.
        seed: of the random inputs, and of the sample.
        dials, speed: the setting at which everything is measured, as `Engine.run` takes them.

    Raises:
        TrimtabError: the build is damaged or was replaced meanwhile, its target or its dense model is missing, or the
            data do not fit.
    """
    if data is None and (limits.min_quality is not None or limits.max_drop is not None):
        raise DataError("a limit on quality needs data to measure it on", hint="give held-out data with --data")
    require_data(peers, data)
    setting = build.manifest.all_dials.values(dials, speed)  # refuse an impossible one, too
    dataset = read_data(data) if data else None  # refuse bad data before minutes of work
    forms = peer_model(build, dense=dense, data=peer_data)
    model = forms.canonical
    graph = load_graph(model)
    workload = Workload.model_validate(build.manifest.workload)
    positions = find_positions(graph)
    for dims in corners(graph, workload):
        check_sizes("workload.tokens", dims.get("tokens", 0), dims.get("past", 0), positions)
    task = build.manifest.task
    source = dense_source(build, model)
    warnings = check_labels(dataset, task, source, graph, limits.max_drop is not None) if dataset else []
    engine = load(build.path, threads=threads, verify=False)
    run = converting(partial(engine.run, dials=dials, speed=speed), engine.inputs)
    exact = converting(partial(engine.run, speed=0.0), engine.inputs)
    as_asked = not engine.dials or dials or speed is not None
    reference = open_peer("dense-fp32", model, threads or 0)
    ids = real_ids(dataset, source, seed) if dataset else None
    comparisons, consistency = check_numbers(
        reference, run if as_asked else exact, graph, workload, ids=ids, seed=seed, progress=progress
    )
    quality, beside = None, {}
    if dataset and all(comparison for comparison in comparisons if task is None or comparison.output == task.output):
        judge = partial(
            check_quality, reference, graph=graph, workload=workload, source=source, dataset=dataset, samples=samples,
            seed=seed, progress=progress, task=task,
        )  # fmt: skip
        decoded = as_decoded(build, threads)
        quality = judge(run if decoded is None else converting(decoded, engine.inputs))
        beside = peer_qualities(peers, forms, threads or 0, judge)
    if quality and dataset and limits.min_quality is None and limits.max_drop is None:
        count = min(samples or dataset.count, dataset.count)
        worst_sample = "unknown" if quality.worst is None else dataset.shown(quality.worst, count, seed)
        warnings += poor_quality(quality, worst_sample)
    elif quality is None and limits.max_error is None:
        warnings += large_errors(comparisons)
    found = Validation(
        outputs=worst(comparisons),
        comparisons=tuple(comparisons),
        consistency=tuple(consistency),
        quality=quality,
        failures=tuple(broken(comparisons, consistency, quality, limits)),
        warnings=tuple(warnings),
        judged=tuple(limits.judged(quality)),
        peers=beside,
        setting=setting,
    )
    record(build, quality=found.summary())
    return found


def real_ids(dataset: Dataset, source: Source, seed: int) -> np.ndarray | None:
    """Token ids of some texts of `dataset`, one text after the other; None for data that are no text."""
    if dataset.arrays is not None or source.tokenizer is None:
        return None
    texts = [text for text, _ in dataset.sample(min(dataset.count, _TEXTS), seed)]
    found = load_tokenizer(source.tokenizer, source.max_tokens).encode(texts)
    ids: np.ndarray = found["input_ids"][found["attention_mask"] > 0]
    return ids


def check_numbers(
    dense: Run,
    compiled: Run,
    graph: gs.Graph,
    workload: Workload,
    *,
    ids: np.ndarray | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[list[OutputError], list[Consistency]]:
    """Compare two models at every corner of `workload`, with and without padding, and samples alone and in a batch.

    Args:
        ids: token ids of real text to draw inputs from; without, they are drawn evenly from the vocabulary.
    """
    report = progress or (lambda what, done, total: None)
    shapes = corners(graph, workload)
    masks = [False, True] if any(tensor.name == "attention_mask" for tensor in graph.inputs) else [False]
    cases = [(dims, padded) for dims in shapes for padded in masks]
    rng = np.random.default_rng(seed)
    comparisons: list[OutputError] = []
    for done, (dims, padded) in enumerate(cases):
        report("compare", done, len(cases))
        comparisons += compare(dense, compiled, graph, dims, rng, padded=padded, ids=ids)
    report("compare", len(cases), len(cases))
    crowds = [dims for dims in shapes if dims.get("batch", 1) > 1]
    if not crowds or not all(comparisons):  # without a batch there is no company; after a fault, nothing to compare
        return comparisons, []
    dims = min(crowds, key=lambda dims: dims["batch"])
    return comparisons, batch_consistency(dense, compiled, graph, workload, dims, rng, ids)


def worst(comparisons: list[OutputError]) -> tuple[OutputError, ...]:
    """Of each output, the comparison that came out worst."""
    found: dict[str, OutputError] = {}
    for each in comparisons:
        if each.output not in found or each.severity > found[each.output].severity:
            found[each.output] = each
    return tuple(found.values())


def broken(
    comparisons: list[OutputError], consistency: list[Consistency], quality: Quality | None, limits: Limits
) -> Iterator[str]:
    """One sentence for each limit that is not kept; of the many outputs of a decoder's cache, for the worst."""
    faults = [each for each in comparisons if each.fault]
    for where in dict.fromkeys(each.where for each in faults):
        for what, each in in_brief([each for each in faults if each.where == where], lambda each: each.severity):
            yield f"output {what!r} at {where}: {each.fault}"
    if limits.max_error is not None:
        far = [each for each in worst(comparisons) if each.relative_l2 is not None]
        for what, each in in_brief(
            [each for each in far if each.severity > limits.max_error], lambda each: each.severity
        ):
            yield (
                f"output {what!r} at {each.where}: relative error {each.relative_l2:.3g} is over {limits.max_error:g}"
            )
    for what, pair in in_brief([pair for pair in consistency if not pair.passed], lambda pair: pair.difference):
        yield (
            f"output {what!r} at {describe(pair.dims)}: a sample in the batch differs from itself alone "
            f"by {pair.difference:.3g}, where {pair.allowed:.3g} is allowed"
        )
    if quality is None:
        return
    if limits.min_quality is not None and quality.score < limits.min_quality:
        yield f"{quality.kind} quality {quality.score:.4f} is under {limits.min_quality:g} ({quality.measured})"
    if limits.max_drop is not None:
        if quality.drop is None:
            yield "a limit on lost accuracy was set, but the data have no labels for this model"
        elif quality.drop > limits.max_drop:
            yield f"{quality.measured} is {quality.drop:.2f} points below dense, over {limits.max_drop:g}"
