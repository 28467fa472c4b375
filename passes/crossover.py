"""Up to where computing chosen rows of a layer pays: by measured times of both forms, or by a rule of thumb."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

MOST_TOKENS = 64
"""Of a call, that are timed: all weights are read by then, and both forms take as much longer for more tokens."""

_PAYS = 0.95
"""Time of the sparse form, of the dense form's, that is worth leaving rows out for: less than that is noise."""
_WORTH = 0.8
"""Speed per byte of the sparse form, of the dense form's, where nothing was measured."""
_MOST = 0.5
"""Share of the rows beyond which a layer stays dense, where nothing was measured."""
_UNBOUNDED = 1 << 20  # tokens

DenseForm = Literal["fp32", "int8", "int8-rows", "int8-blocks", "int4-blocks"]
"""Of the weights of a layer that stays dense, behind all passes: int8 as ONNX Runtime's dynamic quantization has it,
or by the rows of Int8Linear, or integers in blocks of inputs."""

_WEIGHT_BYTES: dict[DenseForm, float] = {
    "fp32": 4, "int8": 1, "int8-rows": 1, "int8-blocks": 1.125, "int4-blocks": 0.5625,
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
        tokens: of the calls that are to be fastest.
    """

    rows: int
    width: int
    matrices: Literal[1, 2, 3]
    form: str
    block: int = 1
    layers: int = 1
    dense: DenseForm = "fp32"
    tokens: int = 1


@dataclass(frozen=True)
class Load:
    """What the tokens of a call compute of a layer.

    Attributes:
        tokens: how many.
        density: share of the rows that one token computes, on average.
        union: share of the rows that any of them computes; each is read once.
        whole: all rows are computed together, since there are so many tokens.
    """

    tokens: int
    density: float
    union: float
    whole: bool = False

    @classmethod
    def of_call(cls, often: np.ndarray, tokens: int, *, shared: bool = False, dense_above: int | None = None) -> Load:
        """Where tokens are drawn from the text at random: a row that a token needs with probability p is needed by any
        of n tokens with 1 - (1 - p)ⁿ. Neighbouring tokens need the same rows more often than that.

        Args:
            often: share of the tokens that compute each row, [rows].
            tokens: n.
            shared: all tokens of a call compute what any of them needs.
            dense_above: calls with more tokens compute all rows.
        """
        if dense_above is not None and tokens > dense_above:
            return cls(tokens, 1.0, 1.0, whole=True)
        union = float(np.mean(1 - (1 - np.asarray(often, np.float64)) ** tokens))
        return cls(tokens, union if shared else float(np.mean(often)), union)


@dataclass(frozen=True)
class Call:
    """Times of one layer in a call of several tokens, in milliseconds.

    Attributes:
        tokens: up to `MOST_TOKENS`.
        dense: of the call, in the form that the layer has if it stays dense.
        whole: of the sparse form, where all rows are computed together.
        fixed: of the sparse form for no rows; read: what all rows take beyond that, to be read once for all tokens;
            each: what all rows take beyond both, for all tokens.
    """

    tokens: int
    dense: float
    whole: float
    fixed: float
    read: float
    each: float

    def sparse(self, load: Load) -> float:
        return self.whole if load.whole else self.fixed + self.read * load.union + self.each * load.density


@dataclass(frozen=True)
class Crossover:
    """Times of one layer, in milliseconds.

    Attributes:
        dense: of one token, in the form that the layer has if it stays dense.
        fixed, full: of one token in the sparse form: what it takes for no rows, and what all rows take beyond that.
        together: (tokens, time) of several tokens that all take all rows, ascending.
        form: of the dense layer.
        call: times of the calls that are to be fastest, where they have several tokens.
    """

    dense: float
    fixed: float
    full: float
    together: tuple[tuple[int, float], ...]
    form: DenseForm = "fp32"
    call: Call | None = None

    def sparse(self, density: float, tokens: int = 1) -> float:
        """Of the sparse form, where each token takes the share `density` of the rows for itself."""
        return self.fixed + self.full * density * tokens

    def most(self, beside: float = 0.0) -> float:
        """The largest share of rows at which one token pays: it is clearly faster than in the dense form; or 0.

        Args:
            beside: bytes that what chooses the rows reads, for each weight of the layer: they take as long as bytes of
                the dense form.
        """
        left = _PAYS * self.dense - self._choice(self.dense, beside) - self.fixed
        return min(1.0, max(0.0, left / self.full))

    def not_faster(self, what: str, load: Load, beside: float = 0.0) -> str | None:
        """Why a layer had better stay dense in the calls that are to be fastest; None where sparse is clearly faster.

        Args:
            what: is computed of the layer.
            load: of such a call.
            beside: as for `most`, and of what stands for the rows that are left out.
        """
        call = self.call or Call(1, self.dense, self.together[0][1], self.fixed, self.full, 0.0)
        sparse = call.sparse(load)
        if sparse + self._choice(call.dense, beside) <= _PAYS * call.dense:
            return None
        share, calls = f"{load.density:.0%} of {what}", "one token"
        if load.tokens > 1:
            share += f" for each token, {load.union:.0%} for any of {load.tokens},"
            calls = f"calls of {load.tokens} tokens (batch × tokens of the workload)"
        if load.whole:
            share = f"all of {what}, which so many tokens compute (dense_above),"
        if call.tokens < load.tokens:
            calls += f", timed with {call.tokens}"
        kind = "" if self.form == "fp32" else f" in {self.form}"
        return (
            f"{share} and the choice of them are not faster than the dense form: for {calls}, measured, "
            f"{sparse:.3f} ms without the choice, beside {call.dense:.3f} ms{kind}"
        )

    def _choice(self, dense: float, beside: float) -> float:
        """Time of what chooses the rows, in a call whose dense form takes `dense`."""
        return dense * beside / _WEIGHT_BYTES[self.form]

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
