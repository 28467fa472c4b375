"""The pass: every FFN becomes its heavy hitters and something cheaper for the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import onnx_graphsurgeon as gs
from pydantic import Field, TypeAdapter, ValidationError
from threadpoolctl import threadpool_limits

from trimtab.passes.anatomy import FFN, find_anatomy, select_ffns
from trimtab.passes.contract import Left, Pass, PassContext, PassResult
from trimtab.passes.errors import RecipeError
from trimtab.passes.ffn_split.budget import COARSE_SHARES, FINE_SHARES, LARGEST, RANKS, Budget, Candidate, choose
from trimtab.passes.ffn_split.emit import emit
from trimtab.passes.ffn_split.fit import Fitter
from trimtab.passes.ffn_split.plan import BITS, HeavyForm, Plan, RestForm, Split
from trimtab.passes.ffn_split.score import Score
from trimtab.passes.graph.opset import raise_opset
from trimtab.passes.layer import read_layer
from trimtab.passes.matrices.quantize import fit_block

_OPSET = {"int8": 21, "int4": 21, "int2": 25}
"""The opset in which DequantizeLinear takes blocks of this type."""

_CHOICE = TypeAdapter(list[tuple[int, int, int, Plan]])
"""Layer, d_ff, d_model and plan of each FFN: what a budget chose, as the Profile keeps it."""


class FFNSplit(Pass):
    """Split each FFN into heavy hitters (FFN1) and the rest (FFN2), and make the rest cheap.

    Source: FFSplit (arXiv 2401.04044). The affine form of the rest is not in the paper: neurons that rarely trigger are
    nearly linear in x, so one low-rank affine map, fitted to their outputs, stands for both of their matrices.
    Exact end: heavy=1 with heavy_form=fp32, or rest_form=fp32 at any share, computes the dense FFN.
    """

    name: ClassVar[str] = "ffn-split"
    summary: ClassVar[str] = "split FFNs into heavy hitters and a cheap rest (FFSplit)"
    needs_profile: ClassVar[bool] = True

    heavy: float = Field(
        0.25,
        ge=0,
        le=1,
        description="share of neurons in FFN1",
        json_schema_extra={"search": [0.125, 0.25, 0.375, 0.5]},
    )
    heavy_form: HeavyForm = Field("fp32", description="of FFN1's weights")
    rest_form: RestForm = Field(
        "affine", description="what becomes of FFN2", json_schema_extra={"search": ["affine", "int4", "drop"]}
    )
    rank: int = Field(
        64, ge=1, description="of FFN2's affine map or low-rank matrices", json_schema_extra={"search": [32, 64, 128]}
    )
    score: Score = Field("residual", description="orders the neurons; heavy hitters come first")
    block: int = Field(64, ge=16, le=256, description="input features per scale of integer weights, at most")
    refit: bool = Field(True, description="fit FFN1's down projection anew, to make up for what FFN2 lost")
    multiple: int = Field(32, ge=1, description="FFN1's neurons are rounded to a multiple of this")
    budget: Budget | None = Field(
        None,
        description="size, time or error of all FFNs; chooses share, form and rank of each layer",
    )
    layers: tuple[int, ...] | None = Field(None, description="split these alone, counted from 0")

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        """Split the FFNs of `graph`. Reads states and statistics of each from the Profile."""
        with threadpool_limits(1, user_api="blas"):  # small factorizations: two threads only wait for each other
            return self._run(graph, context)

    def _run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        self._check_forms(context)
        anatomy = find_anatomy(graph)
        chosen = select_ffns(anatomy, self.layers)
        profile = context.measured()
        left: list[Left] = []
        wanted: list[FFN] = []
        for ffn in chosen:
            reason = self._unfit(ffn)
            if reason:
                left.append(Left(ffn.where, reason))
            else:
                wanted.append(ffn)
        plans = self._budgeted(wanted, context) if self.budget else [self._plan(ffn) for ffn in wanted]
        forms = {form for plan in plans for form in (plan.heavy_form, plan.rest_form)}
        forms |= {"int8"} if any(p.rest_form == "affine" and p.heavy_form in BITS for p in plans) else set()
        raise_opset(graph, max((_OPSET.get(form, 0) for form in forms), default=0))
        rows = []
        for ffn, plan in zip(wanted, plans, strict=True):
            split = Fitter(read_layer(ffn, profile), self.score, [plan]).split(plan)
            emit(graph, ffn, split)
            rows.append(_row(ffn, split))
            _tell(context, "split FFNs", len(rows), len(wanted))
        untouched = sum(ffn.bytes for ffn in anatomy.ffns if ffn not in wanted)
        details = {"layers": rows, "ffn_bytes": untouched + sum(row["bytes"] for row in rows)}
        return PassResult(self.name, len(rows), tuple(left), details)

    def _plan(self, ffn: FFN) -> Plan:
        return Plan(self._neurons(ffn, self.heavy), self.heavy_form, self.rest_form, self.rank, self.block, self.refit)

    def _neurons(self, ffn: FFN, share: float) -> int:
        """`share` of the FFN's neurons, as a multiple where there is room for one."""
        wanted = share * ffn.d_ff
        rounded = self.multiple * max(round(wanted / self.multiple), 1 if share > 0 else 0)
        return min(rounded, ffn.d_ff) if share < 1 else ffn.d_ff

    def _budgeted(self, ffns: list[FFN], context: PassContext) -> list[Plan]:
        """A plan for each FFN, chosen over all of them by measured output error."""
        sizes = [(ffn.layer, ffn.d_ff, ffn.d_model) for ffn in ffns]

        def search() -> Any:
            plans = self._search(ffns, context)
            return _CHOICE.dump_python([(*size, plan) for size, plan in zip(sizes, plans, strict=True)], mode="json")

        def fits(known: Any) -> bool:
            try:
                chosen = _CHOICE.validate_python(known)
            except ValidationError:
                return False
            bits = {BITS[form] for *_, plan in chosen for form in (plan.heavy_form, plan.rest_form) if form in BITS}
            possible = bits <= context.capability.weight_bits and all(plan.heavy <= d_ff for _, d_ff, _, plan in chosen)
            return possible and [tuple(size) for *size, _ in chosen] == sizes

        return [plan for *_, plan in _CHOICE.validate_python(context.choice(self, search, fits))]

    def _search(self, ffns: list[FFN], context: PassContext) -> list[Plan]:
        assert self.budget is not None
        profile = context.measured()
        candidates = []
        for ffn in ffns:
            plans = list(self._candidates(ffn, context))
            fitter = Fitter(read_layer(ffn, profile), self.score, plans, precise=False)
            candidates.append([Candidate.of(fitter.split(plan)) for plan in plans])
            _tell(context, "search the budget", len(candidates), len(ffns))
        dense = [4 * ffn.params for ffn in ffns]
        macs = [sum(linear.in_features * linear.out_features for linear in ffn.linears) for ffn in ffns]
        chosen = choose(candidates, dense, macs, self.budget)
        return [layer[i].plan for layer, i in zip(candidates, chosen, strict=True)]

    def _candidates(self, ffn: FFN, context: PassContext) -> Iterator[Plan]:
        assert self.budget is not None
        bits, seen = context.capability.weight_bits, set()
        heavies: Sequence[str] = [self.heavy_form]
        tails: Sequence[str] = []
        if self.budget.time is None:
            shares: Sequence[float] = COARSE_SHARES
            heavies = [f for f in ("int8", "int4") if BITS[f] in bits] or heavies
            tails = [f for f in ("int4", "int2") if BITS[f] in bits]
        else:
            shares = [share for share in FINE_SHARES if share <= LARGEST * self.budget.time]
        for share in shares:
            for form in heavies:
                rests: list[tuple[str, int]] = [("affine", r) for r in RANKS if r < ffn.d_model] + [("drop", 1)]
                rests += [(tail, 1) for tail in tails if BITS[tail] < BITS.get(form, 32)]
                for rest, rank in rests if share < 1 else [("drop", 1)]:
                    n = self._neurons(ffn, share)
                    plan = Plan(n, form, rest, rank, self.block, self.refit)  # type: ignore[arg-type]
                    if plan not in seen:
                        seen.add(plan)
                        yield plan

    def _check_forms(self, context: PassContext) -> None:
        for form in (self.heavy_form, self.rest_form):
            if form in BITS and BITS[form] not in context.capability.weight_bits and self.budget is None:
                can = ", ".join(f"int{b}" for b in sorted(context.capability.weight_bits)) or "no integer weights"
                raise RecipeError(f"the target does not multiply with {form} weights", hint=f"it takes {can}")

    def _unfit(self, ffn: FFN) -> str | None:
        """Why this FFN stays as it is, or None."""
        if any(linear.quantized is not None for linear in ffn.linears):
            return "its weights are quantized already; split the model before it is quantized"
        if (
            any(form in BITS for form in (self.heavy_form, self.rest_form))
            and fit_block(self.block, ffn.d_model) is None
        ):
            return f"no block of 16 or more divides its {ffn.d_model} input features"
        return None


def _row(ffn: FFN, split: Split) -> dict[str, Any]:
    """What the report says of one layer."""
    plan = split.plan
    has_rest = plan.heavy < ffn.d_ff
    return {
        "layer": ffn.layer,
        "heavy": plan.heavy,
        "neurons": ffn.d_ff,
        "heavy_form": plan.heavy_form if plan.heavy else None,
        "rest_form": plan.rest_form if has_rest else None,
        "rank": plan.rank if has_rest and plan.rest_form in ("affine", "low-rank") else None,
        "error": round(split.error, 6),
        "bytes": split.nbytes,
        "macs": split.macs,
        "dense_bytes": 4 * ffn.params,
    }


def _tell(context: PassContext, what: str, done: int, total: int) -> None:
    if context.progress is not None:
        context.progress(what, done, total)
