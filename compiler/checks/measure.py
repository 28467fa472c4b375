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


_Item = TypeVar("_Item", bound=_OfOutput)
TEXTS = "OSU"
"""NumPy's letters of the types of texts, which are equal or not: they have no error between."""


class OutputError(BaseModel):
    """How far one output of the compiled model is from the dense one's, at one shape.

    Padded tokens of [batch, tokens, ...] outputs do not count, since nothing reads them.

    Attributes:
        output: name of the output.
        dims: sizes of the dynamic dimensions.
        padded: whether some rows end in padding.
        max_abs, mean_abs: maximum and mean of |y - y_dense|.
        relative_l2: ‖y - y_dense‖ / ‖y_dense‖.
        cosine: between y and y_dense, flattened.
        rms: root mean square of y_dense.
        fault: why there are no numbers: the output is missing, has another shape or other texts, or has NaN or Inf.
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

    @property
    def severity(self) -> float:
        """The relative error, by which errors are ordered; a fault is worse than any error."""
        return float("inf") if self.relative_l2 is None else self.relative_l2

    @property
    def where(self) -> str:
        return describe(self.dims) + (", padded" if self.padded else "")


def in_brief(items: Sequence[_Item], severity: Callable[[_Item], float]) -> list[tuple[str, _Item]]:
    """(label, item) for each output; of the many outputs of a decoder's cache, only the worst item."""
    cache = [each for each in items if each.output.startswith(PRESENT)]
    if len(cache) < 2:
        return [(each.output, each) for each in items]
    worst = max(cache, key=severity)
    others = [(each.output, each) for each in items if not each.output.startswith(PRESENT)]
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
    """Compare every output of `compiled` with the same output of `dense`.

    Args:
        mask: [batch, tokens], 0 at padding.
        by_token: names of the outputs that have a row for each token (`token_outputs`).
    """
    outputs = dict(compiled.items())
    where = {"dims": dims, "padded": padded}
    masks = dict.fromkeys(by_token, mask)
    return {
        name: OutputError(output=name, **where, **_errors(expected, outputs.get(name), masks.get(name)))
        for name, expected in dense.items()
    }


def _errors(expected: np.ndarray, actual: np.ndarray | None, mask: np.ndarray | None) -> dict[str, Any]:
    if actual is None:
        return {"fault": "the compiled model does not have this output"}
    if actual.shape != expected.shape:
        return {"fault": f"shape {list(actual.shape)}, where the dense model gives {list(expected.shape)}"}
    if expected.dtype.kind in TEXTS:
        different = _real(expected, mask) != _real(actual, mask)
        if different.any():
            return {"fault": f"{different.sum()} of {different.size} texts are not the dense model's"}
        expected = actual = np.zeros(expected.shape)
    for array, who in ((expected, "the dense model gives"), (actual, "the compiled model gives")):
        if np.isnan(array).any():
            return {"fault": f"{who} NaN"}
        if np.isinf(array).any():
            return {"fault": f"{who} Inf"}
    a, b = real_values(expected, mask), real_values(actual, mask)
    difference = np.abs(b - a)
    return {
        "max_abs": float(difference.max(initial=0)),
        "mean_abs": float(difference.mean()) if difference.size else 0.0,
        "relative_l2": relative_l2(a, b),
        "cosine": _cosine(a, b),
        "rms": float(np.sqrt(np.mean(a**2))) if a.size else 0.0,
    }


def real_values(output: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """`output` flattened, in double precision; of [batch, tokens, ...] outputs only the tokens that are no padding.

    Args:
        mask: [batch, tokens]; None for an output that has no row for each token.
    """
    return _real(output, mask).astype(np.float64)


def _real(output: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    if mask is not None and output.shape[:2] == mask.shape:
        output = output[mask != 0]
    return output.reshape(-1)


def relative_l2(expected: np.ndarray, actual: np.ndarray) -> float:
    """‖actual - expected‖ / ‖expected‖."""
    return float(np.linalg.norm(actual - expected)) / max(float(np.linalg.norm(expected)), 1e-12)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    product = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b / product) if product > 0 else float(np.array_equal(a, b))
