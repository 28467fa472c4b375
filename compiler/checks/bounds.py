"""Default bounds beyond which nobody would ship a build: `validate` warns of them where the user gives no limit.

A bound is larger than the loss of builds that people do ship, such as dense int8, and smaller than the loss of a ruined
model; docs/checks.md has the measurements. With data the task quality decides, since outputs of a good build may be off
by several per cent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from trimtab.compiler.checks.kinds.classes import Agreement, Classification
from trimtab.compiler.checks.kinds.decisions import Decisions
from trimtab.compiler.checks.kinds.embeddings import Embeddings
from trimtab.compiler.checks.kinds.labels import MultiLabel
from trimtab.compiler.checks.kinds.result import Result
from trimtab.compiler.checks.kinds.scores import Scores
from trimtab.compiler.checks.measure import OutputError, in_brief
from trimtab.compiler.checks.perplexity import Perplexity

MAX_ERROR = 0.5
"""RMS of y - y_dense at one shape, divided by the RMS of y_dense over all shapes; used where no data are given.

The relative error at one shape alone does not serve: one sample whose logits happen to be near 0 exceeds any bound.
"""

MAX_DROP = 1.0
"""Points of accuracy, micro-F1 or NDCG@10 below dense, where the 95 % interval of the difference excludes chance."""

MIN_AGREEMENT = 0.9
"""Share of equal classes, tokens or decisions on labels."""

MIN_KAPPA = 0.7
"""Cohen's kappa of decisions beside dense ones. The warning needs 95 % confidence that kappa is below the bound."""

MIN_F1 = 0.5
"""F1 of the worst class or label beside dense decisions. The warning needs 95 % confidence that F1 is below."""

MIN_COSINE = 0.95
"""Mean cosine of embeddings with dense ones."""

MIN_NEIGHBOURS = 0.9
"""Rank correlation of the similarities of embeddings with dense ones; cosines are high where all texts share a part."""

_FEW = 10  # samples below which ranks of similarities say little

MIN_SPEARMAN = 0.95
"""Rank correlation of scores with dense ones."""

MAX_SCORE_ERROR = 0.25
"""Mean error of scores, divided by the standard deviation of the dense scores."""

MAX_PERPLEXITY = 1.1
"""Compiled perplexity divided by dense perplexity."""


def large_errors(comparisons: Iterable[OutputError]) -> Iterator[str]:
    """One sentence for each output that is beyond `MAX_ERROR`; `comparisons` has every output at every shape."""
    by_name: dict[str, list[OutputError]] = {}
    for each in comparisons:
        by_name.setdefault(each.output, []).append(each)
    deviations = [_deviation(name, shapes) for name, shapes in by_name.items()]
    far = [deviation for deviation in deviations if deviation.of_size > MAX_ERROR]
    for what, deviation in in_brief(far, lambda deviation: deviation.of_size):
        yield (
            f"output {what!r} is far from the dense model's: off by {deviation.of_size:.2g} of its size at "
            f"{deviation.where}, beyond {MAX_ERROR:g} (--max-error sets your own limit, --data shows what it costs)"
        )


class _Deviation(NamedTuple):
    """The largest deviation of an output from the dense model's, and the shape where it occurs.

    Attributes:
        of_size: RMS of the deviation, divided by the RMS of the dense output over all shapes.
    """

    output: str
    of_size: float
    where: str


def _deviation(output: str, shapes: Sequence[OutputError]) -> _Deviation:
    size = math.sqrt(sum((each.rms or 0.0) ** 2 for each in shapes) / len(shapes))
    error, at = max(((_rms_error(each), each.where) for each in shapes), key=lambda pair: pair[0])
    return _Deviation(output, error / max(size, 1e-12), at)


def _rms_error(each: OutputError) -> float:
    return (each.relative_l2 or 0.0) * (each.rms or 0.0)


def poor_quality(quality: Result, worst: str) -> Iterator[str]:
    """One sentence for each figure of `quality` that is beyond its bound.

    Args:
        worst: description of the sample on which the models differ most.
    """
    limits = "--min-quality" if quality.drop is None else "--min-quality or --max-drop"
    for figure in _figures(quality):
        yield f"{figure}; the sample that differs most is {worst} (set a limit of your own with {limits})"


def _figures(quality: Result) -> Iterator[str]:
    if isinstance(quality, Classification):
        yield from _lost("accuracy", quality.drop, quality.interval)
        yield from _below("agreement with the dense classes", quality.agreement, MIN_AGREEMENT)
        yield from _by_chance("classes", quality.decisions)
    elif isinstance(quality, MultiLabel):
        yield from _lost("micro-F1", quality.drop, quality.interval)
        yield from _below("agreement with the dense decisions", quality.agreement, MIN_AGREEMENT)
        yield from _by_chance("decisions", quality.decisions)
    elif isinstance(quality, Scores):
        yield from _lost("NDCG@10", quality.drop, quality.interval)
        yield from _below("rank correlation with the dense scores", quality.spearman, MIN_SPEARMAN)
        if quality.relative_error is not None and quality.relative_error > MAX_SCORE_ERROR:
            yield (
                f"mean error of the scores is {quality.relative_error:.2g} standard deviations of the dense scores, "
                f"beyond {MAX_SCORE_ERROR:g}"
            )
    elif isinstance(quality, Embeddings):
        yield from _below("mean cosine with the dense embeddings", quality.mean_cosine, MIN_COSINE)
        if quality.samples >= _FEW:
            what = "rank correlation of the similarities with the dense embeddings'"
            yield from _below(what, quality.spearman, MIN_NEIGHBOURS)
    elif isinstance(quality, Perplexity) and quality.compiled > MAX_PERPLEXITY * quality.dense:
        yield (
            f"perplexity is {quality.compiled / quality.dense - 1:.0%} higher than the dense model's "
            f"({quality.compiled:.4g} for {quality.dense:.4g}), beyond {MAX_PERPLEXITY - 1:.0%}"
        )
    elif isinstance(quality, Agreement):
        yield from _below("agreement with the dense predictions", quality.agreement, MIN_AGREEMENT)
        yield from _by_chance("predictions", quality.decisions)


def _lost(what: str, drop: float | None, interval: tuple[float, float] | None) -> Iterator[str]:
    if drop is not None and interval is not None and drop > MAX_DROP and interval[1] < 0:
        yield f"{what} is {drop:.2f} points below dense, beyond {MAX_DROP:g}"


def _by_chance(what: str, decisions: Decisions | None) -> Iterator[str]:
    if decisions is None:
        return
    if decisions.kappa_upper < MIN_KAPPA:
        yield (
            f"agreement with the dense {what} beyond chance (Cohen's kappa) is {decisions.kappa:.4f}, "
            f"below {MIN_KAPPA:g}"
        )
    if decisions.worst_f1_upper < MIN_F1:
        yield (
            f"F1 of class {decisions.worst_class!r} beside the dense {what} is {decisions.worst_f1:.4f}, "
            f"below {MIN_F1:g}"
        )


def _below(what: str, value: float, bound: float) -> Iterator[str]:
    if value < bound:
        yield f"{what} is {value:.4f}, below {bound:g}"
