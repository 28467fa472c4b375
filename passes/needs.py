"""What a pass needs from the Profile: statistics that calibration measures, or weights that training learns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from trimtab.passes.errors import NotLearnedError, ProfileError
from trimtab.passes.profile import Profile


@dataclass(frozen=True)
class Need(ABC):
    """One part of a Profile. Calibration measures equal needs of several passes once."""

    @abstractmethod
    def check(self, profile: Profile | None) -> None:
        """Check that `profile` has this part. The check does not read the model.

        Raises:
            NotLearnedError: training has not learned this part.
            ProfileError: `profile` is given, and calibration has not measured this part.
        """


@dataclass(frozen=True)
class Measured(Need):
    """Statistics that calibration measures. Without a Profile nothing is missing, because compiling calibrates."""

    def check(self, profile: Profile | None) -> None:
        if profile is not None and not self.is_in(profile):
            raise ProfileError(
                f"the profile has no {self.what}", hint="calibrate this model again, for the passes of this recipe"
            )

    def is_in(self, profile: Profile) -> bool:
        """Whether `profile` has the statistics. Missing layers are reported when passes read them."""
        return True

    @property
    def what(self) -> str:
        """The statistics' name in messages."""
        return "statistics"


@dataclass(frozen=True)
class FFNStates(Measured):
    """A sample of each FFN's inputs, and sums over its activations: `Profile.ffn`."""

    def is_in(self, profile: Profile) -> bool:
        return any(name.startswith("ffn.") and name.endswith(".states") for name in profile.tensors)

    @property
    def what(self) -> str:
        return "states of FFNs"


@dataclass(frozen=True)
class HeadStates(Measured):
    """A sample of the vocabulary head's inputs, for models with such a head: `Profile.head`."""


@dataclass(frozen=True)
class AttentionReceived(Measured):
    """A sample of the attention that tokens receive in each layer: `Profile.received`."""

    def is_in(self, profile: Profile) -> bool:
        return any(name.endswith(".received") for name in profile.tensors)

    @property
    def what(self) -> str:
        return "attention that tokens receive"


@dataclass(frozen=True)
class Learned(Need):
    """Weights that a method of `trimtab train` learns."""

    method: str

    def check(self, profile: Profile | None) -> None:
        if profile is None or not profile.learned(self.method):
            where = "the profile holds" if profile is not None else "there is no profile, and so"
            raise NotLearnedError(f"{where} no weights learned by {self.method}", method=self.method)


DEFAULT: frozenset[Need] = frozenset({FFNStates(), HeadStates()})
"""What calibration measures without a recipe."""


def to_measure(needs: Iterable[Need]) -> frozenset[Need]:
    """The needs among `needs` that calibration measures. The parts of `DEFAULT` are measured together."""
    measured = {need for need in needs if isinstance(need, Measured)}
    return frozenset(measured | (DEFAULT if measured & DEFAULT else set()))
