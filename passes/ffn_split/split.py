"""The pass `ffn-split`: keeps the heavy hitters of every FFN and makes the rest cheap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import onnx_graphsurgeon as gs
from pydantic import Field, TypeAdapter, ValidationError
from threadpoolctl import threadpool_limits

from trimtab.passes.anatomy import FFN, also_read_by, by_weights, find_anatomy, select_ffns, sharing_partly
from trimtab.passes.contract import Capability, Left, Pass, PassContext, PassResult
from trimtab.passes.errors import RecipeError
from trimtab.passes.ffn_split.budget import COARSE_SHARES, FINE_SHARES, LARGEST, RANKS, Budget, Candidate, choose
from trimtab.passes.ffn_split.emit import emit
from trimtab.passes.ffn_split.fit import Fitter
from trimtab.passes.ffn_split.plan import BITS, HeavyForm, Plan, RestForm, Split
from trimtab.passes.ffn_split.score import Score
from trimtab.passes.graph.linear import distinct_bytes
from trimtab.passes.graph.opset import raise_opset
from trimtab.passes.matrices.forms import OPSETS
from trimtab.passes.matrices.quantize import fit_block
from trimtab.passes.needs import FFNStates, Need
from trimtab.passes.sampled_ffn import sample_ffn

_CHOICE = TypeAdapter(list[tuple[int, int, int, Plan]])
"""Layer, d_ff, d_model and plan of each FFN: a budget's choice, in the format of the Profile."""


class FFNSplit(Pass):
    """Split each FFN into heavy hitters (FFN1) and the rest (FFN2), and make the rest cheap.

    Source: FFSplit (arXiv 2401.04044). The affine form of the rest is not in the paper: neurons that rarely trigger are
    nearly linear in x, so one low-rank affine map, fitted to their outputs, stands for both of their matrices.
    Layers that share weights get one split, fitted to the states of all of them.
    Exact end: heavy=1 with heavy_form=fp32, or rest_form=fp32 at any share, computes the dense FFN.
    """

    name: ClassVar[str] = "ffn-split"
    summary: ClassVar[str] = "split FFNs into heavy hitters and a cheap rest (FFSplit)"
    leaves_experts: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({FFNStates()})

    heavy: float = Field(
        0.25,
        ge=0,
        le=1,
        description="share of neurons in FFN1",
    )
    heavy_form: HeavyForm = Field("fp32", description="of FFN1's weights")
    rest_form: RestForm = Field("affine", description="what becomes of FFN2")
    rank: int = Field(64, ge=1, description="of FFN2's affine map or low-rank matrices")
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
        reason = self.unfit(context.capability)
        if reason is not None:
            raise RecipeError(
                f"the target cannot run it: {reason}", hint="leave the pass out, or choose another target"
            )
        anatomy = find_anatomy(graph)
        profile = context.measured()
        left: list[Left] = []
        groups: list[tuple[FFN, ...]] = []
        chosen = select_ffns(anatomy, self.layers)
        for group in by_weights(chosen):
            reason = self._unfit(group[0]) or self._unfit_shared(group, chosen)
            if reason:
                left += [Left(ffn.where, reason) for ffn in group]
            else:
                groups.append(group)
        plans = (
            self._budgeted(groups, context) if self.budget and groups else [self._plan(group[0]) for group in groups]
        )
        forms = {form for plan in plans for form in (plan.heavy_form, plan.rest_form)}
        forms |= {"int8"} if any(p.rest_form == "affine" and p.heavy_form in BITS for p in plans) else set()
        raise_opset(graph, max((OPSETS.get(form, 0) for form in forms), default=0))
        rows = []
        for group, plan in zip(groups, plans, strict=True):
            split = Fitter(sample_ffn(group[0], profile, group[1:]), self.score, [plan]).split(plan)
            emit(graph, group, split)
            rows += [_row(ffn, split, group[0]) for ffn in group]
            _report_progress(context, "split FFNs", len(rows), sum(map(len, groups)))
        split_layers = {row["layer"] for row in rows}
        untouched = [linear for ffn in anatomy.ffns if ffn.layer not in split_layers for linear in ffn.linears]
        details = {
            "layers": sorted(rows, key=lambda row: row["layer"]),
            "ffn_bytes": distinct_bytes(untouched) + sum(row["bytes"] for row in rows),
        }
        return PassResult(self.name, len(rows), tuple(left), details)

    def _plan(self, ffn: FFN) -> Plan:
        return Plan(self._neurons(ffn, self.heavy), self.heavy_form, self.rest_form, self.rank, self.block, self.refit)

    def _neurons(self, ffn: FFN, share: float) -> int:
        """`share` of the FFN's neurons, rounded to a multiple of `multiple`, at most all neurons."""
        rounded = self.multiple * max(round(share * ffn.d_ff / self.multiple), 1 if share > 0 else 0)
        return min(rounded, ffn.d_ff) if share < 1 else ffn.d_ff

    def _budgeted(self, groups: list[tuple[FFN, ...]], context: PassContext) -> list[Plan]:
        """A plan for each group of FFNs with the same weights, chosen together by measured output error."""
        numbers = [number for number, group in enumerate(groups) for _ in group]
        sizes = [(ffn.layer, ffn.d_ff, ffn.d_model) for group in groups for ffn in group]

        def search() -> Any:
            plans = self._search(groups, context)
            rows = [(*size, plans[number]) for size, number in zip(sizes, numbers, strict=True)]
            return _CHOICE.dump_python(rows, mode="json")

        def fits(stored: Any) -> bool:
            try:
                chosen = _CHOICE.validate_python(stored)
            except ValidationError:
                return False
            bits = {BITS[form] for *_, plan in chosen for form in (plan.heavy_form, plan.rest_form) if form in BITS}
            possible = bits <= context.capability.weight_bits and all(plan.heavy <= d_ff for _, d_ff, _, plan in chosen)
            if not possible or [tuple(size) for *size, _ in chosen] != sizes:
                return False
            plans = {(number, plan) for number, (*_, plan) in zip(numbers, chosen, strict=True)}
            return len(plans) == len(groups)  # FFNs of one group have the same plan

        rows = _CHOICE.validate_python(context.choice(self, search, fits))
        plan_of = {number: plan for number, (*_, plan) in zip(numbers, rows, strict=True)}
        return [plan_of[number] for number in range(len(groups))]

    def _search(self, groups: list[tuple[FFN, ...]], context: PassContext) -> list[Plan]:
        assert self.budget is not None
        profile = context.measured()
        candidates = []
        for group in groups:
            plans = list(self._candidates(group[0], context))
            fitter = Fitter(sample_ffn(group[0], profile, group[1:]), self.score, plans, precise=False)
            candidates.append([Candidate.of(fitter.split(plan), len(group)) for plan in plans])
            _report_progress(context, "search the budget", len(candidates), len(groups))
        dense = [4 * group[0].params for group in groups]
        macs = [len(group) * sum(m.in_features * m.out_features for m in group[0].linears) for group in groups]
        chosen = choose(candidates, dense, macs, self.budget, sum(map(len, groups)))
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

    def unfit(self, capability: Capability) -> str | None:
        bits = capability.weight_bits
        can = ", ".join(f"int{b}" for b in sorted(bits)) or "no integer weights"
        forms = [f for f in (self.heavy_form, self.rest_form) if f in BITS and BITS[f] not in bits]
        return f"it does not multiply with {forms[0]} weights, but with {can}" if forms and not self.budget else None

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

    def _unfit_shared(self, group: tuple[FFN, ...], chosen: list[FFN]) -> str | None:
        """Why FFNs that share weights stay as they are, or None."""
        partly = sharing_partly(group, chosen)
        if partly:
            return (
                f"it shares a matrix with {partly[0].where} and has other biases or another activation; see ffn-split"
            )
        by_bytes = self.budget is not None and self.budget.time is None
        where = also_read_by(group) if by_bytes else None
        if where is not None:
            return f"{where} reads its weights too, so the file would keep them beside the new ones"
        return None


def _row(ffn: FFN, split: Split, first: FFN) -> dict[str, Any]:
    """The report's entry of one layer. Bytes that the layer shares with `first` count in the entry of `first`."""
    plan, once = split.plan, int(ffn is first)
    has_rest = plan.heavy < ffn.d_ff
    return {
        "layer": ffn.layer,
        "heavy": plan.heavy,
        "neurons": ffn.d_ff,
        "heavy_form": plan.heavy_form if plan.heavy else None,
        "rest_form": plan.rest_form if has_rest else None,
        "rank": plan.rank if has_rest and plan.rest_form in ("affine", "low-rank") else None,
        "error": round(split.error, 6),
        "bytes": once * split.nbytes,
        "macs": split.macs,
        "dense_bytes": once * 4 * ffn.params,
    } | ({} if once else {"weights_of": first.layer})


def _report_progress(context: PassContext, what: str, done: int, total: int) -> None:
    if context.progress is not None:
        context.progress(what, done, total)
