"""The pass `ffn-topk`: FFNs compute only the neurons that a predictor chooses, with the dialect's sparse ops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from pydantic import Field, model_validator

from trimtab.passes.anatomy import FFN, by_weights, find_anatomy, select_ffns
from trimtab.passes.contract import Left, Pass, PassContext, PassResult
from trimtab.passes.crossover import Crossover, Load, SparseShape, bounds, limit
from trimtab.passes.errors import RecipeError
from trimtab.passes.ffn_topk.choice import Choice
from trimtab.passes.ffn_topk.importance import importance, most_important, norms, places, recall_at, smallest
from trimtab.passes.ffn_topk.predictor import Guess, Predictor, low_rank
from trimtab.passes.graph import constant
from trimtab.passes.graph.opset import raise_opset
from trimtab.passes.matrices.forms import OPSETS, LowRank
from trimtab.passes.matrices.quantize import in_form
from trimtab.passes.needs import FFNStates, Need
from trimtab.passes.sampled_ffn import SampledFFN, sample_ffn
from trimtab.passes.sparse_ffn import (
    RestNodes,
    RestOption,
    RowForm,
    Rows,
    SparseFFN,
    error_bound,
    fit_rest,
    report_rest,
    rest_bytes,
    rewritten,
    unfit,
)
from trimtab.plugins import SELECT_BLOCKS, add_node
from trimtab.plugins.dialect import OPSET


class FFNTopK(Pass):
    """Predict the neurons that matter for a token, and compute only those.

    Source: HiRE (arXiv 2402.09360). The pass takes more neurons than wanted (k' > k), so that a cheap predictor finds
    nearly all wanted neurons; k' is the smallest number that reaches the recall on held-out states. Layers that share
    weights share predictor and k', fitted and measured on the states of all of them.
    A `rest` adds a low-rank map of the input that approximates the neurons left out, including the predictor's misses.
    Exact end: density=1 with weights=fp32 computes the dense FFN.
    """

    name: ClassVar[str] = "ffn-topk"
    summary: ClassVar[str] = "compute only the neurons that a cheap predictor chooses for each token (HiRE)"
    leaves_experts: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({FFNStates()})

    density: float = Field(
        0.1,
        gt=0,
        le=1,
        description="share of neurons wanted for each token",
    )
    recall: float = Field(0.95, gt=0, le=1, description="share of the wanted neurons that must be among those computed")
    take: float | None = Field(
        None, gt=0, le=1, description="share of neurons to compute, instead of what recall asks for"
    )
    most: float | None = Field(
        None,
        gt=0,
        le=1,
        description="FFNs that would compute more stay dense; where that is slower, if not given",
    )
    block: int = Field(1, ge=1, description="neighbouring neurons that are chosen together")
    predictor: Literal["low-rank", "copy"] = Field("low-rank", description="of the projections that decide")
    signal: Literal["gate", "both"] = Field("gate", description="projections of a gated FFN that are guessed")
    rank: int = Field(64, ge=1, description="of a low-rank predictor")
    form: Literal["fp32", "int8", "int4"] = Field("fp32", description="of the predictor's weights")
    common: float = Field(
        0.0, ge=0, lt=1, description="share of neurons that are always computed, those most often wanted"
    )
    shared: bool = Field(False, description="one choice for all tokens of a call")
    weights: RowForm = Field("fp32", description="of the FFN's own weights")
    dense_above: int | None = Field(
        None, ge=0, description="calls with more tokens compute all neurons; chosen if not given"
    )
    exact: bool = Field(
        False, description="of those computed keep the wanted ones alone, for models that were trained with the top-k"
    )
    rest: RestOption | None = Field(
        None,
        description="{rank: r}: a low-rank affine map of the input in place of the neurons that are left out",
    )
    max_error: float | None = error_bound()
    layers: tuple[int, ...] | None = Field(None, description="these FFNs alone, counted from 0")

    @model_validator(mode="after")
    def _leaves_out_what_was_trained(self) -> FFNTopK:
        if self.exact and self.rest is not None:
            raise ValueError("rest: exact is for models that were trained to do without what it would add")
        return self

    @model_validator(mode="after")
    def _takes_enough(self) -> FFNTopK:
        if self.take is not None and self.take < self.density:
            raise ValueError(f"take: {self.take} computes fewer neurons than density {self.density} wants")
        return self

    def bars(self, later: Pass) -> str | None:
        if later.name == "recover":
            return "training does not know the ops that it makes"
        if self.rest is not None and later.name in ("unpad", "token-prune"):
            return f"its rest counts the tokens of a call, which {later.name} changes; put {later.name} in front"
        alone = self.shared and later.name == "unpad"
        return "it makes one choice for all tokens of a call, padding among them" if alone else None

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        """Rewrite the FFNs of `graph`. Reads states of each from the Profile."""
        if self.exact and context.shards > 1:
            raise RecipeError(
                "exact: shards choose without knowing each other's neurons", hint="remove `exact`, or set `shards: 1`"
            )
        anatomy = find_anatomy(graph)
        selected = select_ffns(anatomy, self.layers)
        profile = context.measured()
        raise_opset(graph, max(OPSET, OPSETS.get(self.form, 0)))
        left: list[Left] = []
        rows: list[dict[str, Any]] = []
        weights = Rows(self.weights)
        best, measured = 0.0, False
        for group in by_weights(selected):
            reason = unfit(group[0], self.block, self.weights)
            if reason is None:
                layer = sample_ffn(group[0], profile, group[1:])
                crossover = self._crossover(group[0], len(selected), context)
                measured = crossover is not None and self.most is None
                choice = self._choose(layer, crossover, context.shards)
                best = max(best, choice.recall)
                reason = self._not_worth(choice, crossover, layer, context.tokens)
                if reason is None:
                    by_shards = choice.by_shards(group[0].d_ff, self.block) if context.shards > 1 else {}
                    rows += [row | by_shards for row in self._rewrite(graph, group, layer, choice, crossover, weights)]
            if reason is not None:
                left += [Left(ffn.where, reason) for ffn in group]
            if context.progress is not None:
                context.progress("predict neurons", len(rows) + len(left), len(selected))
        if not rows and best and not measured:
            raise RecipeError(
                f"recall: no FFN finds {self.recall:.0%} with so few of its neurons; the best has {best:.1%}",
                hint="allow more neurons (most), a better predictor (rank, signal), or less recall",
            )
        return rewritten(self.name, anatomy.ffns, rows, left, self.max_error)

    def _crossover(self, ffn: FFN, layers: int, context: PassContext) -> Crossover | None:
        """The target's measurement for this shape; None if no option depends on it, or there is no target."""
        asked = self.dense_above is not None and (self.most is not None or self.take is not None)
        if context.crossover is None or asked:
            return None
        matrices: Literal[2, 3] = 3 if ffn.gated else 2
        each = ffn.d_ff // context.shards if ffn.d_ff % (context.shards * self.block) == 0 else ffn.d_ff  # of a rank
        form = context.dense_form("ffn")
        return context.crossover(
            SparseShape(each, ffn.d_model, matrices, self.weights, self.block, layers, form, context.tokens)
        )

    def _max_density(self, ffn: FFN, predictor: Predictor, crossover: Crossover | None) -> float:
        """The largest share of the neurons that may be computed."""
        return bounds(crossover, self.most, predictor.nbytes / ffn.params)

    def _not_worth(self, choice: Choice, crossover: Crossover | None, layer: SampledFFN, tokens: int) -> str | None:
        """Why the FFN stays dense after all, or None."""
        if self.take is not None:
            return None
        if crossover is not None and self.most is None:
            often = choice.computed(layer.held_out).mean(0)
            above = self._dense_above(float(often.mean()), crossover)
            load = Load.of_call(often, tokens, shared=self.shared, dense_above=above)
            beside = (choice.predictor.nbytes + rest_bytes(layer.ffn, self.rest)) / layer.ffn.params
            reason = crossover.not_faster("its neurons", load, beside)
            if reason is not None:
                return reason
        most = self._max_density(layer.ffn, choice.predictor, crossover)
        if choice.recall < self.recall:
            return f"{most:.0%} of its neurons hold {choice.recall:.1%} of the wanted ones, not {self.recall:.0%}"
        return None

    def _dense_above(self, density: float, crossover: Crossover | None) -> int:
        """Tokens above which a call computes all neurons."""
        return limit(crossover, density) if self.dense_above is None else self.dense_above

    def _choose(self, layer: SampledFFN, crossover: Crossover | None = None, shards: int = 1) -> Choice:
        """Fit a predictor and find the number of blocks to take, per shard if the blocks divide into shards."""
        blocks, norm = layer.ffn.d_ff // self.block, norms(layer)
        shards = shards if blocks % shards == 0 else 1
        k = max(1, round(self.density * blocks))
        common = self._common(importance(layer.h_fit, norm, self.block), k)
        predictor = self._fit(layer, norm, common)
        ranks = places(predictor.scores(layer.held_out), importance(layer.h_held_out, norm, self.block), k, shards)
        least = -(-k // shards)
        if common is not None:  # a shard may have more than its share of them
            least = max(least, int(np.bincount(common // (blocks // shards)).max()))
        if self.take is not None:
            local = -(-round(self.take * blocks) // shards)
        else:
            most = self._max_density(layer.ffn, predictor, crossover)
            local = min(smallest(ranks, self.recall), int(most * blocks) // shards)
        local = min(max(least, local), blocks // shards)
        return Choice(predictor, k, shards * local, recall_at(ranks, local), shards)

    def _common(self, truth: np.ndarray, k: int) -> np.ndarray | None:
        """The blocks that are most often among the k most important ones."""
        count = round(self.common * truth.shape[1])
        if not count:
            return None
        often = np.bincount(most_important(truth, k).reshape(-1), minlength=truth.shape[1])
        return np.sort(np.argsort(-often, kind="stable")[:count])

    def _fit(self, layer: SampledFFN, norm: np.ndarray, common: np.ndarray | None) -> Predictor:
        gated = layer.ffn.gated
        alone = gated and self.signal == "gate"
        projections = list(zip(layer.ups, layer.up_biases, strict=True))[: 1 if alone or not gated else 2]
        typical = None
        if alone:
            up, bias = layer.ups[1], layer.up_biases[1]
            y = layer.fit @ up if bias is None else layer.fit @ up + bias
            typical = np.sqrt(np.square(y).mean(0))
        weight = norm if typical is None else norm * typical
        guesses = []
        for w, bias in projections:
            if self.predictor == "copy" or self.rank >= min(w.shape):
                guesses.append(Guess(in_form(w, self.form, 32), bias))
            else:
                pair = low_rank(w, layer.fit, weight, self.rank)
                guesses.append(Guess(LowRank(*(in_form(m, self.form, 32) for m in pair)), bias))
        return Predictor(layer, guesses, norm, self.block, typical=typical, common=common)

    def _rewrite(
        self, graph: gs.Graph, group: Sequence[FFN], layer: SampledFFN, choice: Choice, crossover: Crossover | None,
        weights: Rows,
    ) -> Iterator[dict[str, Any]]:  # fmt: skip
        """Replace FFNs with the same weights by the sparse ops; yields the report's entry of each FFN."""
        first = group[0]
        name, blocks = f"{self.name}/layer.{first.layer}", first.d_ff // self.block
        above = self._dense_above(choice.take / blocks, crossover)
        keep = choice.k if self.exact else 0
        importance = constant(f"{name}/importance", norms(layer)) if self.exact else None
        sparse = SparseFFN(first, layer, weights, self.block, name)
        everything = choice.take == blocks
        rest, stand_in = None, None
        if self.rest is not None:
            rest = fit_rest(layer, choice.computed, self.rest.rank)
        if rest is not None:
            stand_in = RestNodes(rest, f"{name}/rest", blocks=blocks, taken=choice.take, dense_above=above)
        lost = {} if self.exact else {"error": 0.0 if everything else round(choice.error(layer), 4)}
        every = constant(f"{name}/all", np.arange(blocks, dtype=np.int32)[None])
        predict = None if everything else choice.predictor.store(f"{name}/predict", len(group))
        predictor = 0 if everything else choice.predictor.nbytes
        beside = predictor + (rest.nbytes if rest is not None else 0)
        for ffn in group:
            at, once = f"{self.name}/layer.{ffn.layer}", int(ffn is first)
            of_rest = {} if self.rest is None else report_rest(rest, once)
            chosen: gs.Tensor = every
            if predict is not None:
                chosen = add_node(
                    graph, SELECT_BLOCKS, {"scores": predict(graph, ffn, f"{at}/predict")}, f"{at}/blocks",
                    k=choice.take, shared=int(self.shared), shards=choice.shards, dense_above=above,
                )  # fmt: skip
            sparse.put(graph, ffn, chosen, at, importance=importance, keep=keep, rest=stand_in)
            yield {
                "layer": ffn.layer, "neurons": ffn.d_ff,
                "wanted": choice.k * self.block, "computed": choice.take * self.block,
                "density": round(choice.take / blocks, 4), "recall": round(choice.recall, 4),
                "predictor_bytes": once * predictor,
                "read_bytes": round(beside + sparse.read_bytes(choice.take, keep or None)),
                "bytes": once * round(beside + sparse.nbytes), "dense_bytes": once * 4 * ffn.params,
                "dense_above": above,
            } | lost | of_rest | ({} if once else {"weights_of": first.layer})  # fmt: skip
