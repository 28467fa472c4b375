"""The pass `head-topk`: a vocabulary head that reads few rows of its matrix per token."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from pydantic import Field

from trimtab.passes.anatomy import Anatomy, find_anatomy
from trimtab.passes.contract import Left, Pass, PassContext, PassResult
from trimtab.passes.crossover import Crossover, Load, SparseShape, limit
from trimtab.passes.errors import RecipeError
from trimtab.passes.ffn_topk.shards import expected_recall
from trimtab.passes.graph import constant, insert, replace_uses, stored_bytes
from trimtab.passes.graph.linear import Linear
from trimtab.passes.graph.opset import raise_opset
from trimtab.passes.head_topk.cheap import CheapHead, Head, chosen_often, divergence, rank_likeliest
from trimtab.passes.matrices.forms import OPSETS, LowRank
from trimtab.passes.matrices.quantize import in_form
from trimtab.passes.needs import HeadStates, Need
from trimtab.passes.sparse_ffn.rows import INT4_BLOCK, RowForm, row_bytes, row_constants
from trimtab.plugins import SELECT_BLOCKS, SPARSE_HEAD, add_node
from trimtab.plugins.dialect import OPSET

_HELD_OUT = 5  # every fifth state measures errors and is never used in a fit


class HeadTopK(Pass):
    """Computes exact logits for the candidates of a cheap head, and keeps the cheap logits of all other tokens.

    Source: HiRE (arXiv 2402.09360), which renormalises over the candidates. Here the tail keeps corrected cheap logits,
    so softmax, sampling and log-probabilities stay correct.
    Exact end: take = the vocabulary, with weights=fp32.
    """

    name: ClassVar[str] = "head-topk"
    summary: ClassVar[str] = "exact logits for likely tokens alone, cheap ones for the rest (HiRE)"
    needs: ClassVar[frozenset[Need]] = frozenset({HeadStates()})

    take: int = Field(128, ge=1, description="candidates, whose logits are exact")
    miss: float | None = Field(
        None, gt=0, lt=1, description="bound of the probability to miss the likeliest token; chooses `take`"
    )
    rank: int = Field(128, ge=1, description="of the cheap head")
    form: Literal["fp32", "int8", "int4"] = Field("fp32", description="of the cheap head's weights")
    weights: RowForm = Field("fp32", description="of the head's own weights")
    most: float | None = Field(
        None,
        gt=0,
        le=1,
        description="a head that would compute more stays dense; where that is slower, if not given",
    )
    dense_above: int | None = Field(None, ge=0, description="calls with more tokens are exact; chosen if not given")
    max_divergence: float | None = Field(
        0.5,
        gt=0,
        description="from the dense distribution, nats a token on held-out states; more is refused, null: none",
    )

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        """Rewrite the head of `graph`. Reads the head's input states from the Profile."""
        anatomy = find_anatomy(graph)
        reason = self._unfit(anatomy)
        if reason is not None:
            return PassResult(self.name, 0, (Left("head", reason),))
        assert anatomy.head is not None
        linear = anatomy.head.linears[-1]
        vocabulary = linear.out_features
        if self.take > vocabulary:
            raise RecipeError(f"take: {self.take} candidates of a vocabulary of {vocabulary}", hint="give fewer")
        profile = context.measured()
        raise_opset(graph, max(OPSET, OPSETS.get(self.form, 0)))
        head = Head(linear.w().astype(np.float32), linear.b())
        if self.take == vocabulary:
            exact = {"agreement": 1.0, "divergence": 0.0, "dense_above": 0}
            return self._result(graph, anatomy, linear, head, None, vocabulary, exact)
        states = profile.head(linear.in_features)
        held_out = np.arange(len(states)) % _HELD_OUT == _HELD_OUT - 1
        cheap = CheapHead.fit(head, states[~held_out], self.rank)
        shards = context.shards if vocabulary % context.shards == 0 else 1
        ranks = rank_likeliest(head, cheap, states[held_out], shards)
        if self.miss is None:
            local = -(-self.take // shards)
            if shards > 1:  # take more, until shards include the likeliest token as often as one choice among all
                among_all = rank_likeliest(head, cheap, states[held_out]).agreement(self.take)
                local = min(max(local, ranks.reaching(among_all)), vocabulary // shards)
        else:
            least = ranks.least(self.miss)
            if least is None:
                raise RecipeError(
                    f"miss: {int(held_out.sum())} held-out states show no bound below "
                    f"{ranks.miss_bound(vocabulary):.2%}",
                    hint="calibrate on more data (calibration.states), or allow more",
                )
            local = least
        take = shards * local
        pair = LowRank(*(in_form(m, self.form, 32) for m in (cheap.left, cheap.right)))
        crossover = self._crossover(linear, context)
        above = limit(crossover, take / vocabulary) if self.dense_above is None else self.dense_above
        reason = self._too_many(take / vocabulary)
        if crossover is not None and self.most is None:
            load = Load.of_call(chosen_often(cheap, states[held_out], take, shards), context.tokens, dense_above=above)
            reason = crossover.not_faster("its rows", load, pair.nbytes / (linear.in_features * vocabulary))
        if reason is not None:
            return PassResult(self.name, 0, (Left("head", reason),))
        nats = divergence(head, cheap, states[held_out], take, shards)
        if self.max_divergence is not None and nats > self.max_divergence:
            raise RecipeError(
                f"{take} candidates by a cheap head of rank {self.rank} are {nats:.2f} nats a token from "
                f"the dense distribution on held-out states, more than {self.max_divergence:g}",
                hint="give a larger `take` or `rank` or more calibration.states; `max_divergence: null` takes any",
            )
        metrics: dict[str, Any] = {
            "agreement": round(ranks.agreement(local), 4), "miss_bound": round(ranks.miss_bound(local), 4),
            "divergence": round(nats, 6),
        }  # fmt: skip
        if context.shards > 1:
            metrics |= {"shards": shards, "of_each_shard": local}
            if self.miss is None:
                metrics["expected_recall"] = round(expected_recall(vocabulary, self.take, shards, local), 4)
        metrics["dense_above"] = above
        return self._result(graph, anatomy, linear, head, (pair, cheap.offset), take, metrics, shards)

    def _crossover(self, linear: Linear, context: PassContext) -> Crossover | None:
        """The target's measurement for this shape; None if no option depends on it, or there is no target."""
        if context.crossover is None or (self.dense_above is not None and self.most is not None):
            return None
        rows = linear.out_features
        each = rows // context.shards if rows % context.shards == 0 else rows  # of a rank
        form = context.dense_form("head")
        return context.crossover(
            SparseShape(each, linear.in_features, 1, self.weights, dense=form, tokens=context.tokens)
        )

    def _too_many(self, density: float) -> str | None:
        """Why the head stays dense if it computes more of its rows than `most`; else None."""
        if self.most is None or density <= self.most:
            return None
        return f"{density:.0%} of its rows would be computed, more than {self.most:.0%}"

    def _unfit(self, anatomy: Anatomy) -> str | None:
        """Why the head stays as it is, or None."""
        if anatomy.head is None:
            return "the model has none"
        linear = anatomy.head.linears[-1]
        if anatomy.head.vocabulary is None:
            return f"it has {linear.out_features} classes, no vocabulary"
        if linear.quantized is not None:
            return "its weights are quantized already; choose `weights` of this pass instead"
        if self.weights == "int4" and linear.in_features % INT4_BLOCK:
            return f"int4 blocks of {INT4_BLOCK} do not divide its {linear.in_features} inputs"
        if np.dtype(linear.weight.dtype) != np.float32:
            return f"it computes in {np.dtype(linear.weight.dtype).name}; the sparse ops take float32"
        return None

    def _result(
        self, graph: gs.Graph, anatomy: Anatomy, linear: Linear, head: Head, cheap: tuple[LowRank, np.ndarray] | None,
        take: int,
        metrics: dict[str, Any], shards: int = 1,
    ) -> PassResult:  # fmt: skip
        """Replace the head by the new one; returns the result with the report's details."""
        vocabulary, name = linear.out_features, self.name
        x, predictor = linear.x, 0
        parts: dict[str, gs.Tensor] = {"x": x} | self._rows(anatomy, head)
        if head.bias is not None:
            parts["weight_bias"] = constant(f"{name}/bias", head.bias.astype(np.float32))
        if cheap is None:
            parts["blocks"] = constant(f"{name}/all", np.arange(vocabulary, dtype=np.int32)[None])
            logits = add_node(graph, SPARSE_HEAD, parts, f"{name}/exact")
        else:
            pair, offset = cheap
            predictor = pair.nbytes + 4 * vocabulary
            guess = pair.emit(graph, x, f"{name}/cheap", np.dtype(np.float32))
            shift = constant(f"{name}/offset", offset)
            guess = insert(graph, "Add", [guess, shift], f"{name}/guess", dtype=np.float32)
            rows = add_node(
                graph,
                SELECT_BLOCKS,
                {"scores": guess},
                f"{name}/rows",
                k=take,
                shards=shards,
                dense_above=metrics["dense_above"],
            )
            exact = add_node(graph, SPARSE_HEAD, parts | {"blocks": rows}, f"{name}/exact")
            wide = insert(graph, "Cast", [rows], f"{name}/wide", attrs={"to": 7}, dtype=np.int64)
            places = self._like(graph, wide, exact)
            logits = insert(
                graph, "ScatterElements", [guess, places, exact], f"{name}/logits", attrs={"axis": -1}, dtype=np.float32
            )
        logits.shape = linear.y.shape
        replace_uses(graph, linear.y, logits)
        row = row_bytes(self.weights, linear.in_features)
        details = metrics | {
            "vocabulary": vocabulary, "computed": take, "dense_bytes": linear.bytes,
            "read_bytes": round(predictor + row * take), "bytes": round(predictor + row * vocabulary),
        }  # fmt: skip
        table = anatomy.head.table if anatomy.head is not None else None
        if table is not None:  # the embedding keeps the table; in fp32 it is also the head's matrix
            details["table_bytes"] = stored_bytes(table)
        return PassResult(self.name, 1, (), details)

    def _like(self, graph: gs.Graph, rows: gs.Tensor, exact: gs.Tensor) -> gs.Tensor:
        """`rows`, [tokens, k] or [1, k] for all tokens, in the shape of `exact`, [..., tokens, k]."""
        name = self.name
        shape = insert(graph, "Shape", [exact], f"{name}/shape", dtype=np.int64)
        k = insert(graph, "Shape", [exact], f"{name}/k", attrs={"start": -1}, dtype=np.int64)
        last = constant(f"{name}/tokens", np.array([-1]))
        two = insert(graph, "Concat", [last, k], f"{name}/two", attrs={"axis": 0}, dtype=np.int64)
        flat = insert(graph, "Reshape", [exact, two], f"{name}/flat", dtype=np.float32)
        size = insert(graph, "Shape", [flat], f"{name}/size", dtype=np.int64)
        each = insert(graph, "Expand", [rows, size], f"{name}/each", dtype=np.int64)
        return insert(graph, "Reshape", [each, shape], f"{name}/places", dtype=np.int64)

    def _rows(self, anatomy: Anatomy, head: Head) -> dict[str, gs.Tensor]:
        """The head's matrix as rows. A tied embedding table serves both head and embedding, and is stored once."""
        table = anatomy.head.table if anatomy.head is not None else None
        if self.weights == "fp32" and table is not None:
            return {"weight": table}
        return dict(row_constants(head.weight.T, self.weights, "weight", self.name))
