"""What a pass that leaves neurons out says of its run, and why it refuses one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from trimtab.passes.anatomy import FFN
from trimtab.passes.contract import Left, PassResult
from trimtab.passes.errors import RecipeError
from trimtab.passes.graph.linear import distinct_bytes

MAX_ERROR = 0.5
"""Half of what the layers compute: a model is of no use then. From 0.01 on `compile` warns, and SmolLM2-135M has four
times its perplexity at 0.23 (benchmarks/results/rest.json); a model of random weights, which people try first, has
0.25 to 0.3 with a third of its neurons."""


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
        ffns: all of the graph.
        rows: what the report says of each FFN that was rewritten; "layer" and "bytes" among it, and "error" where the
            pass measured what leaving neurons out costs.
        left: those that were not, of the ones that were wanted.
        max_error: the option of that name.

    Raises:
        RecipeError: more is lost than that.
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
    """Refuse a sparsity that an FFN cannot have, since each token computes its best part in any case.

    Args:
        size: neurons of a part.
        part: what it is called, and the option of its size.

    Raises:
        RecipeError: it is more than that.
    """
    parts = ffn.d_ff // size
    if sparsity > 1 - 1 / parts:
        raise RecipeError(
            f"sparsity: {ffn.where} can leave out {1 - 1 / parts:.1%} of its neurons, not {sparsity:.1%}: a token "
            f"computes one of its {parts} {part}s at least",
            hint=f"ask for less sparsity, or for smaller {part}s ({part})",
        )


def too_dense(density: float, most: float) -> str | None:
    """Why an FFN stays dense that computes more of its neurons than the option `most`, or None."""
    return f"{density:.0%} of its neurons are computed, more than {most:.0%}" if density > most else None
