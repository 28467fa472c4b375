"""Results of passes that leave neurons out, and their common checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from trimtab.passes.anatomy import FFN
from trimtab.passes.contract import Left, PassResult
from trimtab.passes.errors import RecipeError
from trimtab.passes.graph.linear import distinct_bytes

MAX_ERROR = 0.5
"""Half of the variance of the layers' outputs: such a model is useless. `compile` warns from 0.01 on. At 0.23,
SmolLM2-135M has four times its perplexity (benchmarks/results/rest.json). A model of random weights, which many users
try first, has 0.25 to 0.3 with a third of its neurons."""


def error_bound() -> Any:
    """The option `max_error` of a pass."""
    return Field(
        MAX_ERROR,
        gt=0,
        description="of the FFNs' outputs on held-out states, squared and relative to their variance, mean over all "
        "FFNs of the model; more is refused, null: none",
    )


def rewritten(
    name: str, ffns: Sequence[FFN], rows: list[dict[str, Any]], left: Sequence[Left], max_error: float | None = None
) -> PassResult:
    """The result of the pass `name`.

    Args:
        ffns: all FFNs of the graph.
        rows: the report's entry of each rewritten FFN, with "layer" and "bytes", and with "error" if the pass measured
            the error of leaving neurons out.
        left: selected FFNs that were not rewritten.
        max_error: the option `max_error`.

    Raises:
        RecipeError: the error is larger than `max_error`.
    """
    layers = {row["layer"] for row in rows}
    untouched = [linear for ffn in ffns if ffn.layer not in layers for linear in ffn.linears]
    rows = sorted(rows, key=lambda row: row["layer"])
    details: dict[str, Any] = {
        "layers": rows,
        "ffn_bytes": distinct_bytes(untouched) + sum(row["bytes"] for row in rows),
    }
    if rows and all("error" in row for row in rows):
        details["error"] = round(sum(row["error"] for row in rows) / len(ffns), 4)
        if max_error is not None and not details["error"] <= max_error:
            raise RecipeError(
                f"without the neurons that are left out, the FFNs' outputs on held-out states have a squared error of "
                f"{details['error']:.4g} of their variance, more than {max_error:g}",
                hint="compute more of them, add a `rest`, or learn routers (ffn-route); `max_error: null` takes any",
            )
    return PassResult(name, len(rows), tuple(left), details)


def check_sparsity(ffn: FFN, sparsity: float, size: int, part: Literal["block", "group"]) -> None:
    """Refuse a sparsity that an FFN cannot reach, since each token always computes its best part.

    Args:
        size: neurons per part.
        part: name of a part, and of the option that sets its size.

    Raises:
        RecipeError: the FFN cannot reach the sparsity.
    """
    parts = ffn.d_ff // size
    if sparsity > 1 - 1 / parts:
        raise RecipeError(
            f"sparsity: {ffn.where} can leave out {1 - 1 / parts:.1%} of its neurons, not {sparsity:.1%}: a token "
            f"computes one of its {parts} {part}s at least",
            hint=f"ask for less sparsity, or for smaller {part}s ({part})",
        )


def too_dense(density: float, most: float) -> str | None:
    """Why an FFN stays dense if it computes more of its neurons than the option `most`; else None."""
    return f"{density:.0%} of its neurons are computed, more than {most:.0%}" if density > most else None
