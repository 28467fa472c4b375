"""Fits of numbers that are out of range: refused in words, where LAPACK would give its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from trimtab.passes.errors import ModelError


@contextmanager
def in_range() -> Iterator[None]:
    """Of a decomposition that does not exist in floating point, say what the reason is. Also serves as a decorator.

    Raises:
        ModelError: the matrix holds NaN or infinity, or is not positive definite although its diagonal was raised.
    """
    try:
        yield
    except (np.linalg.LinAlgError, ValueError) as error:
        if isinstance(error, ValueError) and "NaN" not in str(error):
            raise
        raise ModelError(
            "weights or states are so large or so small that a fit to them overflows",
            hint="look for damaged weights, and calibrate on data to which the model gives usual answers",
        ) from error
