"""Which tensors each segment of a model reads and passes on, and when each tensor is dropped."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from trimtab.passes.errors import TargetError


@dataclass(frozen=True)
class Leg:
    """The tensors that one segment reads and passes on.

    Attributes:
        reads: the segment's inputs, each an input of the whole model or an output of an earlier segment.
        gives: those outputs of the segment that are read later, or are outputs of the whole model.
        drops: tensors that are no longer in use after the hook behind the segment.
        live: tensors behind the segment that later segments or hooks read.
        results: outputs of the whole model that the segment computes.
    """

    reads: tuple[str, ...]
    gives: tuple[str, ...]
    drops: tuple[str, ...]
    live: tuple[str, ...]
    results: tuple[str, ...]


@dataclass(frozen=True)
class Route:
    """The legs of a model, in the order in which its segments run. Equal names mean the same tensor.

    Attributes:
        inputs, outputs: names of the whole model's inputs and outputs.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    legs: tuple[Leg, ...]

    @classmethod
    def of(
        cls,
        segments: Sequence[tuple[Sequence[str], Sequence[str]]],
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        between: Sequence[Collection[str]] = (),
        companions: Mapping[str, str] = MappingProxyType({}),
    ) -> Route:
        """The route through `segments`, each (its inputs, its outputs).

        Args:
            between: tensors that the hook reads behind each segment; by default none.
            companions: tensor → another tensor that stays in use as long as the first one.

        Raises:
            TargetError: a tensor that is read, or an output of the model, has no source.
        """
        between, available = between or [()] * len(segments), set(inputs)
        for number, (reads, makes) in enumerate(segments):
            _all_in(available, reads, f"segment {number} reads")
            available |= set(makes)
            _all_in(available, between[number], f"the hook behind segment {number} reads")
            _all_in(
                available, [companions[name] for name in sorted(companions.keys() & available)], "a packed tensor has"
            )
        _all_in(available, outputs, "the model gives")
        legs: list[Leg] = []
        later: set[str] = set()  # tensors that are read behind the current segment
        for (reads, makes), done in zip(reversed(segments), reversed(between), strict=True):
            later |= {companions[name] for name in later & companions.keys()}
            used = {*later, *outputs}
            leg = Leg(
                reads=tuple(reads),
                gives=tuple(name for name in makes if name in used or name in done),
                drops=tuple(name for name in dict.fromkeys((*reads, *makes, *done)) if name not in used),
                live=tuple(sorted(later)),
                results=tuple(name for name in makes if name in outputs),
            )
            legs.insert(0, leg)
            later = (later | set(done)) - set(makes) | set(reads)
        return cls(tuple(inputs), tuple(outputs), tuple(legs))


def _all_in(available: set[str], names: Iterable[str], who: str) -> None:
    for name in names:
        if name not in available:
            raise TargetError(
                f"{who} {name!r}, which no input and no earlier segment gives", hint="compile the model again"
            )
