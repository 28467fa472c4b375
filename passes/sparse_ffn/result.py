"""What a pass that leaves neurons out says of its run, and why it refuses one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from trimtab.passes.anatomy import FFN
from trimtab.passes.contract import Left, PassResult
from trimtab.passes.errors import RecipeError
from trimtab.passes.graph.linear import distinct_bytes


def rewritten(name: str, ffns: Sequence[FFN], rows: list[dict[str, Any]], left: Sequence[Left]) -> PassResult:
    """The result of the pass `name`.

    Args:
        ffns: all of the graph.
        rows: what the report says of each FFN that was rewritten; "layer" and "bytes" among it.
        left: those that were not, of the ones that were wanted.
    """
    layers = {row["layer"] for row in rows}
    untouched = [linear for ffn in ffns if ffn.layer not in layers for linear in ffn.linears]
    rows = sorted(rows, key=lambda row: row["layer"])
    details = {"layers": rows, "ffn_bytes": distinct_bytes(untouched) + sum(row["bytes"] for row in rows)}
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
