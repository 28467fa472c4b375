"""A budget for all FFNs together: the plan of each layer that costs least error, or least bytes, on the whole."""

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
"""How many times the mean share a budget of time lets one layer have: fits take time with the cube of it."""

COARSE_SHARES = (0, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 1)
"""Those that it tries where forms vary too."""

RANKS = (16, 64, 128)
"""Ranks of the affine map that a search tries."""


class Budget(BaseModel):
    """What all FFNs together may cost. Exactly one of the three.

    Attributes:
        size: bytes of the FFN weights as stored, as a fraction of their size in fp32; the error is minimised. Weights
            that layers share count once in both.
        time: multiply-adds of the FFNs, as a fraction of the dense ones; the error is minimised. At equal precision an
            FFN's time is proportional to them, whether memory or arithmetic bounds it.
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
    """What a plan costs and what it loses, without the weights that showed it.

    Attributes:
        error, macs: summed over the layers that share the weights.
        nbytes: of the one set of weights.
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
    """Which candidate each layer, or each group of layers that share weights, takes.

    Args:
        candidates: per group, what it could become, with errors measured.
        dense_bytes: of each group's dense FFN, in fp32, once.
        dense_macs: of each group's layers together.
        layers: of all groups together; as many as there are groups, if not given.

    Raises:
        RecipeError: no choice keeps the budget; says what the least is.
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
    """One item of each group, of least total value within the total weight `limit`: a multiple-choice knapsack."""
    least = sum(min(group) for group in weights)
    if least > limit:
        raise RecipeError(f"budget.{what}: the least that can be reached is {least:.4f}", hint="give a larger budget")
    flat_values, flat_weights = np.concatenate(values), np.concatenate(weights)
    group = np.repeat(np.arange(len(values)), [len(v) for v in values])
    one_each = coo_array((np.ones(len(group)), (group, np.arange(len(group)))))
    found = milp(
        flat_values,
        integrality=np.ones(len(group)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(flat_weights[None], -np.inf, limit)],
    )
    assert found.x is not None, found.message
    return [int(np.argmax(found.x[group == g])) for g in range(len(values))]
