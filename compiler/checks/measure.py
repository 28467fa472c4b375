"""How far one model's outputs are from another's, in numbers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from trimtab.compiler.decoder_cache import PRESENT


class _OfOutput(Protocol):
    @property
    def output(self) -> str: ...


_Found = TypeVar("_Found", bound=_OfOutput)


class OutputError(BaseModel):
    """How far one output of the compiled model is from the dense one's, at one shape.

    Padded tokens are left out of [batch, tokens, ...] outputs, since nothing reads them.

    Attributes:
        output: its name.
        dims: sizes of the dynamic dimensions.
        padded: whether some rows ended in padding.
        max_abs, mean_abs: of |y - y_dense|.
        relative_l2: ‖y - y_dense‖ / ‖y_dense‖.
        cosine: between y and y_dense, flattened.
        rms: root mean square of y_dense.
        fault: why there are no numbers: an output missing, of another shape, NaN or Inf.
    """

    model_config = ConfigDict(frozen=True)

    output: str
    dims: dict[str, int]
    padded: bool
    max_abs: float | None = None
    mean_abs: float | None = None
    relative_l2: float | None = None
    cosine: float | None = None
    rms: float | None = None
    fault: str | None = None

    def __bool__(self) -> bool:
        """What Polygraphy counts as a match."""
        return self.fault is None

    @property
    def severity(self) -> float:
        """By which the worst is found: the relative error; a fault is worse than any."""
        return float("inf") if self.relative_l2 is None else self.relative_l2

    @property
    def where(self) -> str:
        return describe(self.dims) + (", padded" if self.padded else "")


def in_brief(found: Sequence[_Found], how_bad: Callable[[_Found], float]) -> list[tuple[str, _Found]]:
    """(what it is called, what was found) of each output; of the many of a decoder's cache, the worst."""
    cache = [each for each in found if each.output.startswith(PRESENT)]
    if len(cache) < 2:
        return [(each.output, each) for each in found]
    worst = max(cache, key=how_bad)
    others = [(each.output, each) for each in found if not each.output.startswith(PRESENT)]
    return [*others, (f"{worst.output}, the worst of {len(cache)} of the cache", worst)]


def describe(dims: Mapping[str, int]) -> str:
    """{"batch": 8, "tokens": 48} → "batch 8, tokens 48"."""
    return ", ".join(f"{name} {size}" for name, size in dims.items())


def measure(
    dense: Mapping[str, np.ndarray],
    compiled: Mapping[str, np.ndarray],
    *,
    dims: dict[str, int],
    padded: bool,
    mask: np.ndarray | None,
    by_token: Collection[str],
) -> dict[str, OutputError]:
    """Every output of `compiled` beside that of `dense`. Serves Polygraphy, whose results are such mappings too.

    Args:
        mask: [batch, tokens], not 0 where there is a token.
        by_token: names of the outputs that have a row for each token (`token_outputs`).
    """
    found = dict(compiled.items())
    where = {"dims": dims, "padded": padded}
    masks = dict.fromkeys(by_token, mask)
    return {
        name: OutputError(output=name, **where, **_errors(expected, found.get(name), masks.get(name)))
        for name, expected in dense.items()
    }


def _errors(expected: np.ndarray, found: np.ndarray | None, mask: np.ndarray | None) -> dict[str, Any]:
    if found is None:
        return {"fault": "the compiled model does not have this output"}
    if found.shape != expected.shape:
        return {"fault": f"shape {list(found.shape)}, where the dense model gives {list(expected.shape)}"}
    for array, who in ((expected, "the dense model gives"), (found, "the compiled model gives")):
        if np.isnan(array).any():
            return {"fault": f"{who} NaN"}
        if np.isinf(array).any():
            return {"fault": f"{who} Inf"}
    a, b = real_values(expected, mask), real_values(found, mask)
    difference = np.abs(b - a)
    return {
        "max_abs": float(difference.max(initial=0)),
        "mean_abs": float(difference.mean()) if difference.size else 0.0,
        "relative_l2": relative_l2(a, b),
        "cosine": _cosine(a, b),
        "rms": float(np.sqrt(np.mean(a**2))) if a.size else 0.0,
    }


def real_values(output: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """`output` flattened, in double precision; of [batch, tokens, ...] only the tokens that are no padding.

    Args:
        mask: [batch, tokens]; None for an output that has no row for each token.
    """
    if mask is not None and output.shape[:2] == mask.shape:
        output = output[mask != 0]
    return output.reshape(-1).astype(np.float64)


def relative_l2(expected: np.ndarray, found: np.ndarray) -> float:
    """‖found - expected‖ / ‖expected‖."""
    return float(np.linalg.norm(found - expected)) / max(float(np.linalg.norm(expected)), 1e-12)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    product = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b / product) if product > 0 else float(np.array_equal(a, b))
