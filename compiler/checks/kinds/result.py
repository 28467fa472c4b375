"""What every kind of task quality has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

from pydantic import BaseModel, ConfigDict


class Result(BaseModel, ABC):
    """Quality of a compiled model beside its dense model.

    Attributes:
        samples: number of samples that both models ran on.
        worst: index of the sample on which the two models differ most, in the order of `Dataset.sample`.
    """

    model_config = ConfigDict(frozen=True)

    samples: int
    worst: int | None = None

    @property
    @abstractmethod
    def measured(self) -> str:
        """The name of `score`, for people."""

    @property
    @abstractmethod
    def score(self) -> float:
        """The number that a limit on quality is compared with; 1 is best."""

    @property
    def drop(self) -> float | None:
        """Points (of 100) of `score` that the compiled model loses against the dense one; None without labels."""
        return None

    @abstractmethod
    def lines(self) -> list[str]:
        """The figures, for people."""
