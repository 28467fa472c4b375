"""Removes finished samples from a batch between two segments.

The outputs of finished samples are stored; the tensors of the other samples are gathered into a smaller batch.

A packed tensor holds the tokens of all samples one after the other, [tokens, ...], and its offsets are [batch + 1]
integers: offsets[b] .. offsets[b + 1] are the rows of sample b.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import numpy as np

from trimtab.compiler.targets.segmented.hook import Hook
from trimtab.compiler.targets.segmented.route import Route
from trimtab.compiler.targets.segmented.segment import Segment, Values
from trimtab.passes.errors import TargetError


@dataclass(frozen=True)
class Exit:
    """A point where samples may leave.

    Attributes:
        after: number of the segment behind which samples leave.
        stays: tensor that marks the samples that go on: bool, [batch], or the integer numbers of these samples, [any].
        outputs: output of the whole model → the tensor, [batch, ...], that holds it for a sample that leaves here.
    """

    after: int
    stays: str
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class Layout:
    """How the tensors that cross an exit hold their samples. Each tensor is in one of the three attributes.

    Attributes:
        batched: tensors whose first axis is the batch.
        packed: packed tensor → tensor of its offsets.
        common: tensors that are the same for all samples.
    """

    batched: AbstractSet[str] = frozenset()
    packed: Mapping[str, str] = field(default_factory=dict)
    common: AbstractSet[str] = frozenset()


class Compaction(Hook):
    """Removes finished samples from the batch behind each exit. Where no sample is left, later segments do not run.

    Every output of the model has the batch as its first axis, in the order of the input samples. Where all samples go
    on, tensors are passed on without a copy.

    Args:
        exits: at most one behind each segment.
        layout: layout of every tensor that crosses an exit.
    """

    def __init__(self, exits: Sequence[Exit], layout: Layout) -> None:
        self._exits, self._layout = {point.after: point for point in exits}, layout
        self.companions = layout.packed
        if len(self._exits) < len(exits):
            raise ValueError("there are two exits behind one segment")

    def reads(self, number: int) -> Collection[str]:
        point = self._exits.get(number)
        return () if point is None else {point.stays, *point.outputs.values()}

    def check(self, route: Route) -> None:
        """Check that the exits fit a model with this route.

        Raises:
            ValueError: an exit is behind no segment or behind the last one, its outputs are not those that later
                segments compute, or a tensor that crosses it is missing in the layout.
        """
        last = len(route.legs) - 1
        in_layout = {*self._layout.batched, *self._layout.common, *self._layout.packed, *self._layout.packed.values()}
        for number, point in self._exits.items():
            if not 0 <= number < last:
                raise ValueError(f"an exit behind segment {number} of {last + 1}")
            later = {name for leg in route.legs[number + 1 :] for name in leg.results}
            if later != set(point.outputs) or not later:
                raise ValueError(
                    f"the exit behind segment {number} gives {sorted(point.outputs)}, and later segments compute "
                    f"{sorted(later)}"
                )
            if missing := set(route.legs[number].live) - in_layout:
                raise ValueError(f"how {sorted(missing)} hold their samples behind segment {number} is not known")

    def begin(self, route: Route) -> Hook:
        return _Call(route, self._exits, self._layout)


class _Call(Hook):
    """The state of one call: the samples that go on, and the outputs of those that are finished."""

    def __init__(self, route: Route, exits: Mapping[int, Exit], layout: Layout) -> None:
        self._route, self._exits, self._layout = route, exits, layout
        self._rows: np.ndarray | None = None  # places in the batch of the samples that go on; None: all samples
        self._batch = 0  # samples of the call; set where the first sample leaves
        self._done: dict[str, np.ndarray] = {}

    def after(self, number: int, segment: Segment, values: Values) -> Values | None:
        leg = self._route.legs[number]
        for name in leg.results:
            self._place(name, segment.host(values[name]), self._rows)
        point = self._exits.get(number)
        if point is None:
            return values
        answers = {name: segment.host(values[tensor]) for name, tensor in point.outputs.items()}
        count = len(next(iter(answers.values())))
        stays = _numbers(segment.host(values[point.stays]), count, point.stays)
        if len(stays) == count > 0:
            return values
        rows = np.arange(count) if self._rows is None else self._rows
        if self._rows is None:
            self._batch = count
        leaves = np.setdiff1d(np.arange(count), stays, assume_unique=True)
        for name, answer in answers.items():
            self._place(name, answer[leaves], rows[leaves])
        self._rows = rows[stays]
        return self._gather(segment, values, stays, leg.live) if len(stays) else None

    def results(self, segment: Segment, values: Values, names: Sequence[str]) -> dict[str, np.ndarray]:
        return {name: self._done[name] for name in names}

    def _place(self, name: str, value: np.ndarray, rows: np.ndarray | None) -> None:
        """Store `value` of the output `name` for the samples at `rows`, by default for all samples."""
        if rows is None:
            self._done[name] = value
            return
        whole = self._done.get(name)
        if whole is None:
            whole = self._done[name] = np.zeros((self._batch, *value.shape[1:]), value.dtype)
        if (whole.shape[1:], whole.dtype) != (value.shape[1:], value.dtype):
            raise TargetError(
                f"exits disagree on the output {name!r}: {value.dtype} {list(value.shape[1:])} for some samples, "
                f"{whole.dtype} {list(whole.shape[1:])} for others"
            )
        whole[rows] = value

    def _gather(self, segment: Segment, values: Values, stays: np.ndarray, live: Sequence[str]) -> Values:
        """`values`, with the tensors `live` reduced to the samples `stays`."""
        packed, gathered = self._layout.packed, dict(values)
        tokens: dict[str, np.ndarray] = {}  # offsets → rows of the tokens that stay
        for name in live:
            if name in packed.values():
                tokens[name], gathered[name] = _packed_rows(segment.host(values[name]), stays)
        for name in live:
            if name in packed:
                gathered[name] = segment.take(values[name], tokens[packed[name]])
            elif name in self._layout.batched:
                gathered[name] = segment.take(values[name], stays)
        return gathered


def _numbers(stays: np.ndarray, count: int, name: str) -> np.ndarray:
    """Numbers of the samples that stay, from a mask or from numbers."""
    if stays.dtype == bool and stays.shape == (count,):
        return np.flatnonzero(stays)
    numbers = stays.astype(np.int64)
    if stays.dtype.kind not in "iu" or stays.ndim != 1 or not _distinct(numbers, count):
        raise TargetError(
            f"{name!r} does not tell which of {count} samples go on: it is {stays.dtype} {stays.tolist()}"
        )
    return numbers


def _distinct(numbers: np.ndarray, count: int) -> bool:
    return len(np.unique(numbers)) == len(numbers) and bool(np.all((numbers >= 0) & (numbers < count)))


def _packed_rows(offsets: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of `samples` in a packed tensor with these `offsets`, and the offsets of the gathered rows."""
    lengths = (offsets[1:] - offsets[:-1])[samples]
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(offsets.dtype)
    rows = np.repeat(offsets[:-1][samples] - ends[:-1], lengths) + np.arange(ends[-1])
    return rows, ends
