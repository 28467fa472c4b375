"""Which tensor goes where among the segments of a model, and after which of them it is dropped."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from trimtab.passes.errors import TargetError


@dataclass(frozen=True)
class Leg:
    """What one segment takes and leaves.

    Attributes:
        reads: its inputs, each an input of the whole model or an output of an earlier segment.
        gives: those of its outputs that are read behind it, or are the whole model's.
        drops: tensors that are in no use any more when what is done behind it is done.
        live: tensors that are read later, of all there are behind it.
        results: outputs of the whole model that it computes.
    """

    reads: tuple[str, ...]
    gives: tuple[str, ...]
    drops: tuple[str, ...]
    live: tuple[str, ...]
    results: tuple[str, ...]


@dataclass(frozen=True)
class Route:
    """The legs of a model, in the order in which its segments run. Tensors of one name are one tensor.

    Attributes:
        inputs, outputs: of the whole model.
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
            between: tensors that are read behind each segment by what is done there; by default none.
            companions: tensor → another one, which stays in use as long as that.

        Raises:
            TargetError: nothing gives a tensor that is read, or an output of the model.
        """
        between, known = between or [()] * len(segments), set(inputs)
        for number, (reads, makes) in enumerate(segments):
            _all_in(known, reads, f"segment {number} reads")
            known |= set(makes)
            _all_in(known, between[number], f"what is done behind segment {number} reads")
            _all_in(known, [companions[name] for name in sorted(companions.keys() & known)], "a packed tensor has")
        _all_in(known, outputs, "the model gives")
        legs: list[Leg] = []
        later: set[str] = set()  # tensors that are read behind
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


def _all_in(known: set[str], names: Iterable[str], who: str) -> None:
    for name in names:
        if name not in known:
            raise TargetError(
                f"{who} {name!r}, which no input and no earlier segment gives", hint="compile the model again"
            )
