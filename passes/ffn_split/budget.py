"""A budget for all FFNs together: chooses one plan per layer so that the total error, or the total size, is minimal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from trimtab.passes.errors import RecipeError
from trimtab.passes.ffn_split.plan import Plan, Split

FINE_SHARES = (0, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)
"""Shares of heavy neurons that a search tries where all weights keep their precision: small ones save time."""

LARGEST = 3
"""Limit of one layer's share under a time budget, in multiples of the mean share. The time of a fit grows with the cube
of a layer's share."""

COARSE_SHARES = (0, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 1)
"""Shares of heavy neurons that a search tries where weight forms vary too."""

RANKS = (16, 64, 128)
"""Ranks of the affine map that a search tries."""


class Budget(BaseModel):
    """Limit of the cost of all FFNs together. Exactly one attribute is set.

    Attributes:
        size: bytes of the stored FFN weights, as a fraction of their size in fp32; the error is minimised. Weights that
            layers share count once.
        time: multiply-adds of the FFNs, as a fraction of the dense ones; the error is minimised. At equal precision an
            FFN's time is proportional to its multiply-adds, whether memory or arithmetic bounds it.
        error: squared error of the FFN outputs on held-out states relative to their variance, the mean over layers; the
            bytes are minimised.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    size: float | None = Field(None, gt=0, le=1, description="bytes of all FFNs' weights, as a share of fp32's")
    time: float | None = Field(None, gt=0, le=1, description="multiply-adds of all FFNs, as a share of the dense ones")
    error: float | None = Field(
        None, ge=0, description="squared error of the FFNs' outputs on held-out states, relative to their variance"
    )

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if sum(value is not None for value in (self.size, self.time, self.error)) != 1:
            raise ValueError("a budget is one of size, time and error")
        return self


@dataclass(frozen=True)
class Candidate:
    """Cost and error of a plan, without the fitted weights.

    Attributes:
        error, macs: error and multiply-adds, summed over the layers that share the weights.
        nbytes: bytes of the shared weights.
    """

    plan: Plan
    error: float
    nbytes: int
    macs: int

    @classmethod
    def of(cls, split: Split, uses: int = 1) -> Candidate:
        """Args: uses: layers that share the weights."""
        return cls(split.plan, uses * split.error, split.nbytes, uses * split.macs)


def choose(
    candidates: Sequence[Sequence[Candidate]],
    dense_bytes: Sequence[int],
    dense_macs: Sequence[int],
    budget: Budget,
    layers: int | None = None,
) -> list[int]:
    """Choose a candidate for each group of layers that share weights.

    Args:
        candidates: candidates of each group, with measured errors.
        dense_bytes: bytes of each group's dense FFN in fp32; shared weights count once.
        dense_macs: multiply-adds of each group's dense layers together.
        layers: number of layers in all groups; by default one per group.

    Returns:
        number of the chosen candidate of each group.

    Raises:
        RecipeError: no choice keeps the budget. The message states the smallest possible budget.
    """
    cost: Callable[[Candidate], float] = (
        (lambda s: float(s.macs)) if budget.time is not None else (lambda s: float(s.nbytes))
    )
    costs = [[cost(split) for split in layer] for layer in candidates]
    errors = [[split.error for split in layer] for layer in candidates]
    if budget.error is not None:
        scale, count = float(sum(dense_bytes)), layers or len(candidates)
        mean = [[error / count for error in layer] for layer in errors]
        return _knapsack([[c / scale for c in layer] for layer in costs], mean, budget.error, "error")
    total = float(sum(dense_macs if budget.time is not None else dense_bytes))
    limit = budget.time if budget.time is not None else budget.size
    assert limit is not None
    return _knapsack(errors, [[c / total for c in layer] for layer in costs], limit, "time" if budget.time else "size")


def _knapsack(values: list[list[float]], weights: list[list[float]], limit: float, what: str) -> list[int]:
    """Multiple-choice knapsack: one item per group with the least total value, within the total weight `limit`."""
    least = sum(min(group) for group in weights)
    if least > limit:
        raise RecipeError(f"budget.{what}: the least that can be reached is {least:.4f}", hint="give a larger budget")
    flat_values, flat_weights = np.concatenate(values), np.concatenate(weights)
    group = np.repeat(np.arange(len(values)), [len(v) for v in values])
    one_each = coo_array((np.ones(len(group)), (group, np.arange(len(group)))))
    solution = milp(
        flat_values,
        integrality=np.ones(len(group)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(flat_weights[None], -np.inf, limit)],
    )
    assert solution.x is not None, solution.message
    return [int(np.argmax(solution.x[group == g])) for g in range(len(values))]
