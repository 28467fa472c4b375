"""What every kind of task quality has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

from pydantic import BaseModel, ConfigDict


class Result(BaseModel, ABC):
    """Quality of a compiled model beside its dense self.

    Attributes:
        samples: that both were run on.
        worst: place of the sample on which the two differ most, in the order in which `Dataset.sample` gives them.
    """

    model_config = ConfigDict(frozen=True)

    samples: int
    worst: int | None = None

    @property
    @abstractmethod
    def measured(self) -> str:
        """What `score` is, in words."""

    @property
    @abstractmethod
    def score(self) -> float:
        """What a limit on quality is held against; 1 is best."""

    @property
    def drop(self) -> float | None:
        """Points (of 100) that the compiled model is below the dense one against labels; None without labels."""
        return None

    @abstractmethod
    def lines(self) -> list[str]:
        """The figures, for people."""
