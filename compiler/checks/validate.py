"""`trimtab validate`: compares a build with the model it was compiled from, in its outputs and at its task."""

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
from trimtab.compiler.counts import check_count
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

_TEXTS = 256  # texts whose tokens fill the inputs at the corners of the workload


class Limits(BaseModel):
    """Limits for a build; None is no limit. NaN, Inf and a batch that changes its samples are never allowed.

    Attributes:
        max_error: largest ‖y - y_dense‖ / ‖y_dense‖ of any output at any shape.
        min_quality: smallest `score` of the task quality: accuracy, micro-F1, NDCG@10 or rank correlation, 0 to 1;
            without labels agreement with the dense model, or mean cosine of embeddings; dense perplexity divided by
            compiled perplexity.
        max_drop: largest loss, in points of accuracy, micro-F1, NDCG@10 or rank correlation, against the dense
            model; it needs labels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_error: float | None = Field(None, ge=0)
    min_quality: float | None = Field(None, ge=-1, le=1)
    max_drop: float | None = None

    def judged(self, quality: Quality | None) -> Iterator[str]:
        """One phrase for each limit."""
        if self.max_error is not None:
            yield f"relative error at most {self.max_error:g}"
        if self.min_quality is not None and quality is not None:
            yield f"{quality.measured} at least {self.min_quality:g}"
        if self.max_drop is not None and quality is not None:
            yield f"{quality.measured} at most {self.max_drop:g} points below dense"


class Validation(BaseModel):
    """The result of `trimtab validate`.

    Attributes:
        outputs: the worst comparison of each output.
        comparisons: comparisons of every output at every shape.
        consistency: comparisons of samples alone and in a batch; empty where the workload has no batch.
        quality: task quality on the data; None without data.
        failures: one sentence for each broken limit.
        warnings: one sentence for each figure beyond a default bound, where the user gave no limit.
        judged: one phrase for each limit of the user.
        peers: quality of each peer, on the same samples.
        setting: dial → value at which quality was measured, for builds that have dials.
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
        """Whether every limit is kept; None where the user gave no limit and nothing failed."""
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
        peer_rows = {"peers": quality_rows(self.quality, self.peers)} if self.quality and self.peers else {}
        return verdict | quality | {"outputs": shown} | peer_rows


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
    """Compare the engine of `build` with its dense model, and record the result beside the build.

    The dense model runs in ONNX Runtime on the CPU, the engine on its own target. For a build with dials, task
    quality is measured at their defaults, and outputs are compared at their exact end, unless the user asks for a
    setting: work that the dials skip is no error of the graph.

    Args:
        data: held-out data to measure the task quality on.
        dense: the dense ONNX file; by default the one that the build was compiled from.
        samples: maximum number of samples of the data; None for all.
        peers: engines of the dense model whose quality is measured beside the build's.
        peer_data: calibration data of peers that are calibrated statically.
        seed: seed of the random inputs, and of the sampling.
        dials, speed: the setting of all measurements, as `Engine.run` takes them.

    Raises:
        TrimtabError: the build is damaged or was replaced meanwhile, its target or its dense model is missing, or the
            data do not fit.
    """
    if data is None and (limits.min_quality is not None or limits.max_drop is not None):
        raise DataError("a limit on quality needs data to measure it on", hint="give held-out data with --data")
    require_data(peers, data)
    if samples is not None:
        check_count("samples", samples)
    setting = build.manifest.all_dials.values(dials, speed)  # refuses an impossible setting, too
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
    setting_given = not engine.dials or dials or speed is not None
    reference = open_peer("dense-fp32", model, threads or 0)
    ids = real_ids(dataset, source, seed) if dataset else None
    comparisons, consistency = check_numbers(
        reference, run if setting_given else exact, graph, workload, ids=ids, seed=seed, progress=progress
    )
    quality, peer_results = None, {}
    faults = {each.output for each in comparisons if each.fault}
    if dataset and not (faults if task is None else faults & {task.output}):
        judge = partial(
            check_quality, reference, graph=graph, workload=workload, source=source, dataset=dataset, samples=samples,
            seed=seed, progress=progress, task=task,
        )  # fmt: skip
        decoded = as_decoded(build, threads)
        quality = judge(run if decoded is None else converting(decoded, engine.inputs))
        peer_results = peer_qualities(peers, forms, threads or 0, judge)
    if quality and dataset and limits.min_quality is None and limits.max_drop is None:
        count = min(samples or dataset.count, dataset.count)
        worst_sample = "unknown" if quality.worst is None else dataset.shown(quality.worst, count, seed)
        warnings += poor_quality(quality, worst_sample)
    elif quality is None and limits.max_error is None:
        warnings += large_errors(comparisons)
    validation = Validation(
        outputs=worst(comparisons),
        comparisons=tuple(comparisons),
        consistency=tuple(consistency),
        quality=quality,
        failures=tuple(broken(comparisons, consistency, quality, limits)),
        warnings=tuple(warnings),
        judged=tuple(limits.judged(quality)),
        peers=peer_results,
        setting=setting,
    )
    record(build, quality=validation.summary())
    return validation


def real_ids(dataset: Dataset, source: Source, seed: int) -> np.ndarray | None:
    """Token ids of some texts of `dataset`, concatenated; None for data that are no text."""
    if dataset.arrays is not None or source.tokenizer is None:
        return None
    texts = [text for text, _ in dataset.sample(min(dataset.count, _TEXTS), seed)]
    encoded = load_tokenizer(source.tokenizer, source.max_tokens).encode(texts)
    ids: np.ndarray = encoded["input_ids"][encoded["attention_mask"] > 0]
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
    """Compare two models at every corner of `workload`, with and without padding; and samples alone and in a batch.

    Args:
        ids: token ids of real text to draw inputs from; by default ids are drawn evenly from the vocabulary.
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
    batched = [dims for dims in shapes if dims.get("batch", 1) > 1]
    if not batched or any(each.fault for each in comparisons):  # a fault leaves nothing to compare
        return comparisons, []
    dims = min(batched, key=lambda dims: dims["batch"])
    return comparisons, batch_consistency(dense, compiled, graph, workload, dims, rng, ids)


def worst(comparisons: list[OutputError]) -> tuple[OutputError, ...]:
    """The worst comparison of each output."""
    worst_of: dict[str, OutputError] = {}
    for each in comparisons:
        if each.output not in worst_of or each.severity > worst_of[each.output].severity:
            worst_of[each.output] = each
    return tuple(worst_of.values())


def broken(
    comparisons: list[OutputError], consistency: list[Consistency], quality: Quality | None, limits: Limits
) -> Iterator[str]:
    """One sentence for each broken limit; of the many outputs of a decoder's cache, only for the worst."""
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
