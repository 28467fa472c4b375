"""The density up to which computing only chosen rows of a layer pays, from measured times or by a rule of thumb."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

MAX_TOKENS = 64
"""Largest call that is timed. Such a call reads all weights, and more tokens slow both forms down equally."""

_PAYS = 0.95
"""Sparse time over dense time above which a layer stays dense: smaller gains are noise."""
_WORTH = 0.8
"""Speed per byte of the sparse form over the dense form's, if nothing was measured."""
_MAX_DENSITY = 0.5
"""Share of the rows above which a layer stays dense, if nothing was measured."""
_UNBOUNDED = 1 << 20  # tokens

DenseForm = Literal["fp32", "int8", "int8-rows", "int8-blocks", "int4-blocks"]
"""Weights of a dense layer after all passes: int8 of ONNX Runtime's dynamic quantization, int8 rows of Int8Linear, or
integers in blocks of inputs."""

_WEIGHT_BYTES: dict[DenseForm, float] = {
    "fp32": 4, "int8": 1, "int8-rows": 1, "int8-blocks": 1.125, "int4-blocks": 0.5625,
}  # fmt: skip


@dataclass(frozen=True)
class SparseShape:
    """The properties of a layer that decide the speed of its sparse form.

    Attributes:
        rows: neurons of an FFN, or tokens of a vocabulary.
        width: values per row.
        matrices: 3 for a gated FFN, 2 for a plain one, 1 for a head.
        form: form of the weights, a value of the passes' option `weights`.
        block: neighbouring rows that are chosen together.
        layers: layers of this shape in the model. Weights that stay in the cache are read faster.
        dense: form of the weights if the layer stays dense.
        tokens: tokens of the calls that the engine is optimized for.
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
    """How many rows of a layer the tokens of a call compute.

    Attributes:
        tokens: tokens of the call.
        density: share of the rows that one token computes, on average.
        union: share of the rows that at least one token computes; each is read once.
        whole: the call has so many tokens that all rows are computed together.
    """

    tokens: int
    density: float
    union: float
    whole: bool = False

    @classmethod
    def of_call(cls, often: np.ndarray, tokens: int, *, shared: bool = False, dense_above: int | None = None) -> Load:
        """The load of a call whose tokens are drawn at random: at least one of n tokens needs a row with probability
        1 - (1 - p)ⁿ if one token needs it with p. Neighbouring tokens share more rows than that.

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
        tokens: tokens of the call, up to `MAX_TOKENS`.
        dense: time of the dense form.
        whole: time of the sparse form if all rows are computed together.
        fixed: time of the sparse form without rows.
        read: additional time to read all rows once for all tokens.
        each: additional time to compute all rows for every token.
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
        dense: time of one token in the dense form.
        fixed: time of one token in the sparse form without rows.
        full: additional time of one token for all rows.
        together: (tokens, time) of calls whose tokens compute all rows together, ascending.
        form: form of the dense layer's weights.
        call: times of the calls that the engine is optimized for, if they have several tokens.
    """

    dense: float
    fixed: float
    full: float
    together: tuple[tuple[int, float], ...]
    form: DenseForm = "fp32"
    call: Call | None = None

    def sparse(self, density: float, tokens: int = 1) -> float:
        """Time of the sparse form if each token reads its own share `density` of the rows."""
        return self.fixed + self.full * density * tokens

    def max_density(self, beside: float = 0.0) -> float:
        """The largest share of rows at which one token is clearly faster than in the dense form; 0 if there is none.

        Args:
            beside: bytes that the predictor of the rows reads, per weight of the layer. They take as long as bytes of
                the dense form.
        """
        left = _PAYS * self.dense - self._choice(self.dense, beside) - self.fixed
        return min(1.0, max(0.0, left / self.full))

    def not_faster(self, what: str, load: Load, beside: float = 0.0) -> str | None:
        """Why a layer should stay dense in the calls that the engine is optimized for; None if sparse is faster.

        Args:
            what: name of the rows in the message.
            load: load of such a call.
            beside: as for `max_density`, plus the bytes of the map that replaces the rows left out.
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
        """Time to choose the rows, in a call whose dense form takes `dense`."""
        return dense * beside / _WEIGHT_BYTES[self.form]

    def dense_above(self, density: float) -> int:
        """The largest number of tokens for which reading each token's own rows is faster than reading all rows once."""
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
"""Measures the crossover of a shape on a target; returns None if the target cannot measure it."""


def bounds(crossover: Crossover | None, most: float | None, beside: float) -> float:
    """The largest share of rows that a layer may compute: the option `most`, else the measured bound."""
    if most is not None:
        return most
    return _MAX_DENSITY if crossover is None else crossover.max_density(beside)


def limit(crossover: Crossover | None, density: float) -> int:
    """Tokens above which a call computes all rows."""
    return max(1, int(_WORTH / density)) if crossover is None else crossover.dense_above(density)
