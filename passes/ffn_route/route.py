"""The pass `ffn-route`: routers choose the groups of an FFN's neurons that a token needs; only these are computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from pydantic import Field, model_validator

from trimtab.passes.anatomy import FFN, by_weights, find_anatomy, select_ffns
from trimtab.passes.contract import Left, Pass, PassContext, PassResult
from trimtab.passes.crossover import Crossover, Load, SparseShape
from trimtab.passes.dials import Dial
from trimtab.passes.errors import NotLearnedError
from trimtab.passes.ffn_route.cumulative import shares_before
from trimtab.passes.ffn_route.fitted import THRESHOLD, Fitted, GroupBy, fit
from trimtab.passes.ffn_route.grouping import check_groups
from trimtab.passes.ffn_route.router import BITS, Router
from trimtab.passes.ffn_route.routers import METHOD, Routers
from trimtab.passes.graph.opset import raise_opset
from trimtab.passes.needs import FFNStates, Learned, Need
from trimtab.passes.profile import Profile
from trimtab.passes.sampled_ffn import FFNWeights, sample_ffn
from trimtab.passes.sparse_ffn import (
    Rest,
    RestNodes,
    RestOption,
    RowForm,
    Rows,
    SparseFFN,
    TokenDial,
    bars_token_dial,
    error_bound,
    fit_rest,
    report_rest,
    rest_bytes,
    rewritten,
    too_dense,
    unfit,
)
from trimtab.plugins import SELECT_BLOCKS, add_node
from trimtab.plugins.dialect import OPSET

DIAL = "route_threshold"
_USUAL = 0.5  # default of the dial without a Profile
_SPARSITY, _GROUP = 0.5, 32  # defaults of fitted routers
_INTEGERS = ("int8", "int4")


class FFNRoute(Pass):
    """Compute the groups of neurons whose router says that a token needs them (LTE, arXiv 2402.06126).

    A router is a linear layer on the FFN's input with a sigmoid, or int4 copies of the projections before the
    activation. A group is computed if its score is not below the dial. The best group is always computed.
    `trimtab train --method lte` learns routers and fits the model to them. Without training, routers are fitted to
    calibration states (MoEfication, arXiv 2110.01786).
    A `rest` adds a low-rank map of the input that approximates the groups left out; it is fitted to the dense outputs
    at the dial's default.
    Exact end of the dial: at 0 all groups are computed.
    """

    name: ClassVar[str] = "ffn-route"
    summary: ClassVar[str] = "compute only the groups of neurons that routers choose for each token (LTE, MoEfication)"
    leaves_experts: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({Learned(METHOD)})
    reads_layers: ClassVar[bool] = True

    router: Literal["trained", "fitted"] = Field(
        "trained",
        description="routers of `trimtab train --method lte`, or fitted to calibration data, without training",
    )
    sparsity: float | None = Field(
        None,
        gt=0,
        lt=1,
        description=f"of fitted routers: share of an FFN's neurons that is left out, on average; {_SPARSITY}",
    )
    group: int | None = Field(
        None, ge=1, description=f"of fitted routers: neurons that are switched together; {_GROUP}"
    )
    group_by: GroupBy | None = Field(
        None,
        description="of fitted routers: neurons of a group are needed by the same tokens (need, if not given) or point "
        "the same way (weights)",
    )
    threshold: float | None = Field(
        None, ge=0, le=1, description="default of the dial: score from which on a group is computed; as in training"
    )
    cap: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of an FFN's groups that a token may take, the best; below 1 no value of the dial is exact",
    )
    shared: bool = Field(
        False,
        description="all tokens of a call compute the groups that reach the dial for any of them, or the best one",
    )
    weights: RowForm = Field("fp32", description="of the FFN's own weights")
    dense_above: int | None = Field(
        None, ge=0, description="calls with more tokens compute all neurons, whatever the dial; never, if not given"
    )
    most: float | None = Field(
        None, gt=0, le=1, description="FFNs that compute more on average stay dense; where that is slower, if not given"
    )
    rest: RestOption | None = Field(
        None, description="{rank: r}: a low-rank affine map of the input in place of the groups that are left out"
    )
    max_error: float | None = error_bound()
    layers: tuple[int, ...] | None = Field(None, description="these FFNs alone, counted from 0")

    @model_validator(mode="after")
    def _fits_its_routers(self) -> FFNRoute:
        fitted_options = [name for name in ("sparsity", "group", "group_by") if getattr(self, name) is not None]
        if self.router == "trained" and fitted_options:
            raise ValueError(f"{fitted_options[0]}: trained routers have their own; it goes with `router: fitted`")
        return self

    def needed(self) -> frozenset[Need]:
        if self.router == "fitted":
            return frozenset({FFNStates()})
        return self.needs | ({FFNStates()} if self.rest is not None else frozenset())

    def dials(self) -> tuple[Dial, ...]:
        return (self._dial(_USUAL),)

    def _dial(self, learned: float) -> Dial:
        default = learned if self.threshold is None else self.threshold
        return Dial(
            DIAL,
            "score of the router from which on a group of neurons is computed",
            0.0,
            1.0,
            default,
            exact=0.0,
            fast=1.0,
        )

    def bars(self, later: Pass) -> str | None:
        return bars_token_dial(later.name)

    def check_profile(self, profile: Profile | None, before: Sequence[Pass]) -> None:
        super().check_profile(profile, before)
        if self.router == "fitted":
            return
        assert profile is not None
        if not Routers.of(profile.learned(METHOD)).by_layer:
            raise NotLearnedError("the profile has no routers", method=METHOD)

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        """Rewrite the FFNs of `graph` that have routers in the Profile, or that routers are fitted for.

        Raises:
            ProfileError: the routers belong to another model, or the Profile has no states for a fit.
            RecipeError: the group size does not divide the neurons, or the FFNs cannot reach the requested sparsity.
        """
        anatomy = find_anatomy(graph)
        profile = context.measured()
        selected = select_ffns(anatomy, self.layers)
        left: list[Left] = []
        fitted: dict[int, Fitted] = {}
        if self.router == "fitted":
            fitted, left = self._fit(selected, profile, context)
            routers = Routers({layer: each.router for layer, each in fitted.items()}, THRESHOLD, None)
            selected = [ffn for ffn in selected if ffn.layer in fitted]
        else:
            routers = Routers.of(profile.learned(METHOD)).bound({ffn.layer: ffn for ffn in anatomy.ffns})
        if self.weights in _INTEGERS and BITS in context.capability.weight_bits:
            routers = routers.in_integers()
        raise_opset(graph, max(OPSET, routers.opset))
        dial = self._dial(routers.default)
        tensor = context.add_dial(graph, dial)
        emit = _Emit(self, graph, TokenDial(graph, tensor, f"{self.name}/dial"), routers, fitted)
        done = 0
        rows: list[dict[str, Any]] = []
        for group in by_weights(selected):
            for ffn in group:
                router = routers.by_layer.get(ffn.layer)
                reason: str | None = "the profile has no router of it"
                if router is not None:
                    block = ffn.d_ff // router.groups
                    reason = unfit(ffn, block, self.weights) or router.unfit(ffn, context.capability)
                often = None
                if reason is None and router is not None:
                    often = self._often(ffn, router, routers, profile, dial.default)
                    reason = self._not_worth(ffn, router, often, len(selected), context)
                row_or_reason: dict[str, Any] | str | None = reason
                if reason is None and router is not None:
                    rest = fitted[ffn.layer].rest if fitted else self._rest(ffn, router, routers, profile, dial.default)
                    row_or_reason = emit.replace(
                        ffn, group[0], router, None if often is None else float(often.mean()), rest
                    )
                if isinstance(row_or_reason, dict):
                    rows.append(row_or_reason)
                else:
                    left.append(Left(ffn.where, str(row_or_reason)))
                done += 1
                if context.progress is not None:
                    context.progress("route neurons", done, len(selected))
        return rewritten(self.name, anatomy.ffns, rows, left, self.max_error)

    def _fit(self, ffns: Sequence[FFN], profile: Profile, context: PassContext) -> tuple[dict[int, Fitted], list[Left]]:
        """Fitted routers by layer, and the FFNs that stay dense. Layers that share weights share a router."""
        fitted: dict[int, Fitted] = {}
        left: list[Left] = []
        group = self.group or _GROUP
        for same in by_weights(ffns):
            check_groups(same[0].d_ff, group, same[0].where)
            reason = unfit(same[0], group, self.weights)
            if reason is None:
                one = fit(
                    sample_ffn(same[0], profile, same[1:]), group, self.sparsity or _SPARSITY, self.group_by or "need",
                    cut=self._dial(THRESHOLD).default, cap=self.cap, rank=self.rest.rank if self.rest else None,
                )  # fmt: skip
                fitted |= {ffn.layer: one for ffn in same}
            else:
                left += [Left(ffn.where, reason) for ffn in same]
            if context.progress is not None:
                context.progress("fit routers", len(fitted) + len(left), len(ffns))
        return fitted, left

    def _often(self, ffn: FFN, router: Router, routers: Routers, profile: Profile, cut: float) -> np.ndarray | None:
        """Share of the Profile's states that compute each group at `cut`, [groups]; None without states."""
        states = profile.states(ffn.layer)
        if not len(states) or states.shape[1] != ffn.d_model:
            return None
        often: np.ndarray = routers.chosen(router.scores(states), cut, self.taken(router)).mean(0)
        return often

    def _rest(self, ffn: FFN, router: Router, routers: Routers, profile: Profile, cut: float) -> Rest | None:
        """The rest map for the groups left out at `cut`; None without the option, or if it would not lower the error.

        FFNs that share weights have separate rest maps, because they have separate routers.

        Raises:
            ProfileError: the Profile has no states of the FFN.
        """
        if self.rest is None:
            return None
        taken = self.taken(router)
        return fit_rest(
            sample_ffn(ffn, profile), lambda x: routers.chosen(router.scores(x), cut, taken), self.rest.rank
        )

    def taken(self, router: Router) -> int:
        """Limit of the groups that one token computes."""
        return router.share(self.cap)

    def _not_worth(
        self, ffn: FFN, router: Router, often: np.ndarray | None, layers: int, context: PassContext
    ) -> str | None:
        """Why the FFN stays dense, or None. An FFN of unknown density is rewritten."""
        if often is None:
            return None
        if self.most is not None:
            return too_dense(float(often.mean()), self.most)
        crossover = self._crossover(ffn, router, layers, context)
        if crossover is None:
            return None
        load = Load.of_call(often, context.tokens, shared=self.shared, dense_above=self.dense_above)
        return crossover.not_faster("its neurons", load, (router.nbytes + rest_bytes(ffn, self.rest)) / ffn.params)

    def _crossover(self, ffn: FFN, router: Router, layers: int, context: PassContext) -> Crossover | None:
        if context.crossover is None:
            return None
        block = ffn.d_ff // router.groups
        matrices: Literal[2, 3] = 3 if ffn.gated else 2
        form = context.dense_form("ffn")
        return context.crossover(
            SparseShape(ffn.d_ff, ffn.d_model, matrices, self.weights, block, layers, form, context.tokens)
        )


class _Emit:
    """Replaces FFNs by routers and sparse ops. Weights that several FFNs share are stored once."""

    def __init__(
        self, step: FFNRoute, graph: gs.Graph, dial: TokenDial, routers: Routers, fitted: Mapping[int, Fitted]
    ) -> None:
        self._step, self._graph, self._dial, self._routers, self._fitted = step, graph, dial, routers, fitted
        self._rows = Rows(step.weights)
        self._stored: dict[tuple[int, int], SparseFFN] = {}

    def replace(
        self, ffn: FFN, first: FFN, router: Router, density: float | None, rest: Rest | None
    ) -> dict[str, Any] | str:
        """Rewrite `ffn`, which shares the weights of `first`; returns the report's entry, or why `ffn` stays dense."""
        step, graph, at = self._step, self._graph, f"{self._step.name}/layer.{ffn.layer}"
        block, k, fitted = ffn.d_ff // router.groups, step.taken(router), self._fitted.get(ffn.layer)
        scores = router.emit(graph, ffn, at)
        if self._routers.cumulative is not None:
            scores = shares_before(graph, scores, router.groups, at)
        above = self._dial.taken_off(scores, ffn.x, at)
        if isinstance(above, str):
            return above
        key = first.layer, block
        once = key not in self._stored
        if once:
            name = f"{step.name}/layer.{ffn.layer}"
            weights, rows = FFNWeights(first), self._rows
            if fitted is not None:
                weights.reorder(fitted.order)
                rows = Rows(step.weights)  # no other FFN has this order
            self._stored[key] = SparseFFN(first, weights, rows, block, name)
        sparse = self._stored[key]
        dense_above = -1 if step.dense_above is None else step.dense_above
        chosen = add_node(
            graph, SELECT_BLOCKS, {"scores": above}, f"{at}/blocks", k=k, shared=int(step.shared), at_most=1,
            dense_above=dense_above,
        )  # fmt: skip
        stand_in = None
        if rest is not None:
            stand_in = RestNodes(
                rest, f"{at}/rest", blocks=router.groups, taken=k, at_most=True, dense_above=dense_above
            )
        sparse.put(graph, ffn, chosen, at, at_most=True, rest=stand_in)
        beside = router.nbytes + (rest.nbytes if rest is not None else 0)
        row: dict[str, Any] = {
            "layer": ffn.layer, "neurons": ffn.d_ff, "groups": router.groups, "of_each_group": block, "cap": k * block,
            "router_bytes": router.nbytes, "router_macs": router.macs, "bytes": beside + round(once * sparse.nbytes),
            "dense_bytes": once * 4 * ffn.params,
        }  # fmt: skip
        if density is not None:
            row |= {
                "density": round(density, 4),
                "read_bytes": round(beside + sparse.read_bytes(density * router.groups)),
            }
        if fitted is not None:
            row |= {"sparsity": round(fitted.sparsity, 4), "error": round(fitted.error, 4)}
        if step.rest is not None:
            row |= report_rest(rest)
        return row | ({} if once else {"weights_of": first.layer})
