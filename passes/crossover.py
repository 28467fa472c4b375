"""Up to where computing chosen rows of a layer pays: by measured times of both forms, or by a rule of thumb."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

_WORTH = 0.8
"""Speed per byte of the sparse form, of the dense form's, where nothing was measured."""
_MOST = 0.5
"""Share of the rows beyond which a layer stays dense, where nothing was measured."""
_UNBOUNDED = 1 << 20  # tokens

DenseForm = Literal["fp32", "int8", "int8-rows", "int8-blocks", "int4-blocks"]
"""Of the weights of a layer that stays dense, behind all passes: int8 as ONNX Runtime's dynamic quantization has it,
or by the rows of Int8Linear, or integers in blocks of inputs."""

_WEIGHT_BYTES: dict[DenseForm, float] = {
    "fp32": 4, "int8": 1, "int8-rows": 1, "int8-blocks": 1.125, "int4-blocks": 0.625,
}  # fmt: skip


@dataclass(frozen=True)
class SparseShape:
    """What decides how fast the sparse form of a layer is.

    Attributes:
        rows: neurons of an FFN, or tokens of a vocabulary; width: of a row.
        matrices: 3 for a gated FFN, 2 for a plain one, 1 for a head.
        form: of the weights, as `weights` of the passes has it.
        block: neighbouring rows that are chosen together.
        layers: of this shape in the model, since what stays in the cache is read faster.
        dense: form of the layer if it stays dense.
    """

    rows: int
    width: int
    matrices: Literal[1, 2, 3]
    form: str
    block: int = 1
    layers: int = 1
    dense: DenseForm = "fp32"


@dataclass(frozen=True)
class Crossover:
    """Times of one layer, in milliseconds.

    Attributes:
        dense: of one token, in the form that the layer has if it stays dense.
        fixed, full: of one token in the sparse form: what it takes for no rows, and what all rows take beyond that.
        together: (tokens, time) of several tokens that all take all rows, ascending.
        form: of the dense layer.
    """

    dense: float
    fixed: float
    full: float
    together: tuple[tuple[int, float], ...]
    form: DenseForm = "fp32"

    def sparse(self, density: float, tokens: int = 1) -> float:
        """Of the sparse form, where each token takes the share `density` of the rows for itself."""
        return self.fixed + self.full * density * tokens

    def most(self, beside: float = 0.0) -> float:
        """The largest share of rows at which one token is not slower than in the dense form; 0 where none is.

        Args:
            beside: bytes that what chooses the rows reads, for each weight of the layer: they take as long as bytes of
                the dense form.
        """
        choice = self.dense * beside / _WEIGHT_BYTES[self.form]
        return min(1.0, max(0.0, (self.dense - choice - self.fixed) / self.full))

    def dense_above(self, density: float) -> int:
        """The most tokens of a call for which each token's own rows are read faster than all rows for all tokens."""
        best = 1
        for (fewer, less), (more, longer) in zip(self.together, self.together[1:], strict=False):
            slope = (longer - less) / (more - fewer)
            for tokens in range(fewer, more + 1):
                if self.sparse(density, tokens) > less + slope * (tokens - fewer):
                    return best
                best = tokens
        *_, (last, time) = self.together
        each, here = self.full * density, time / last
        return _UNBOUNDED if each <= here else best


Measure = Callable[[SparseShape], Crossover | None]
"""How a target tells the crossover of a shape; None where it cannot."""


def bounds(found: Crossover | None, most: float | None, beside: float) -> float:
    """The largest share of rows that a layer may compute: what is asked for, else what was measured."""
    if most is not None:
        return most
    return _MOST if found is None else found.most(beside)


def limit(found: Crossover | None, density: float) -> int:
    """Tokens above which a call computes all rows."""
    return max(1, int(_WORTH / density)) if found is None else found.dense_above(density)


def slower(what: str, density: float, found: Crossover) -> str:
    """Why a layer stays dense, in the form that it has then."""
    kind = "" if found.form == "fp32" else f" in {found.form}"
    return (
        f"{density:.0%} of {what} and the choice of them take longer than all: for one token, measured, "
        f"{found.sparse(density):.3f} ms without the choice, beside {found.dense:.3f} ms{kind}"
    )
