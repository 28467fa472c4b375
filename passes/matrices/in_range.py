"""Explains why a fit fails on numbers out of range, in place of LAPACK's error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from trimtab.passes.errors import ModelError


@contextmanager
def in_range() -> Iterator[None]:
    """Turn errors of matrix decompositions in the body into a ModelError. Also usable as a decorator.

    Raises:
        ModelError: the matrix contains NaN or infinity, or is not positive definite although its diagonal was raised.
    """
    try:
        yield
    except (np.linalg.LinAlgError, ValueError) as error:  # since NumPy 1.25, the first is one of the second
        if not isinstance(error, np.linalg.LinAlgError) and "NaN" not in str(error):
            raise
        raise out_of_range() from error


def out_of_range() -> ModelError:
    """The error of a fit whose numbers overflow."""
    return ModelError(
        "weights or states are so large or so small that a fit to them overflows",
        hint="look for damaged weights, and calibrate on data to which the model gives usual answers",
    )
