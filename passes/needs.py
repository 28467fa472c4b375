"""What a pass takes from the Profile: calibration measures what the passes of a recipe ask for, training learns it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from trimtab.passes.errors import NotLearnedError, ProfileError
from trimtab.passes.profile import Profile


@dataclass(frozen=True)
class Need(ABC):
    """One part of a Profile. Equal needs of several passes are measured once."""

    @abstractmethod
    def check(self, profile: Profile | None) -> None:
        """Check that `profile` has it, as far as that shows without the model.

        Raises:
            NotLearnedError: training has to give it, and has not.
            ProfileError: `profile` is given, and calibration has not measured it.
        """


@dataclass(frozen=True)
class Measured(Need):
    """What calibration measures. Without a Profile nothing is missing: it is measured in the compile."""

    def check(self, profile: Profile | None) -> None:
        if profile is not None and not self.is_in(profile):
            raise ProfileError(
                f"the profile has no {self.what}", hint="calibrate this model again, for the passes of this recipe"
            )

    def is_in(self, profile: Profile) -> bool:
        """Whether `profile` has it. What it has of single layers is told when passes read it."""
        return True

    @property
    def what(self) -> str:
        """How messages call it."""
        return "statistics"


@dataclass(frozen=True)
class FFNStates(Measured):
    """Of each FFN a sample of its inputs and the sums over its activations: `Profile.ffn`."""

    def is_in(self, profile: Profile) -> bool:
        return any(name.startswith("ffn.") and name.endswith(".states") for name in profile.tensors)

    @property
    def what(self) -> str:
        return "states of FFNs"


@dataclass(frozen=True)
class HeadStates(Measured):
    """A sample of what the vocabulary head reads, of models that have one: `Profile.head`."""


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
"""What calibration measures for whom no recipe is known."""


def to_measure(needs: Iterable[Need]) -> frozenset[Need]:
    """What calibration measures for `needs`: those that it can, and `DEFAULT` as one."""
    measured = {need for need in needs if isinstance(need, Measured)}
    return frozenset(measured | (DEFAULT if measured & DEFAULT else set()))
