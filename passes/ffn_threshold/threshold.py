"""The pass `ffn-threshold`: an FFN leaves out the neurons whose activations are small for a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from pydantic import Field

from trimtab.passes.anatomy import FFN, by_weights, find_anatomy, select_ffns
from trimtab.passes.contract import Left, Pass, PassContext, PassResult
from trimtab.passes.crossover import Crossover, Load, SparseShape
from trimtab.passes.dials import Dial
from trimtab.passes.ffn_threshold.levels import Levels
from trimtab.passes.ffn_threshold.quantiles import (
    Sizes,
    chosen,
    contributions,
    first_activations,
    threshold_at,
    thresholds,
)
from trimtab.passes.graph import constant, insert
from trimtab.passes.graph.opset import raise_opset
from trimtab.passes.needs import FFNStates, Need
from trimtab.passes.sampled_ffn import FFNWeights, SampledFFN, sample_ffn
from trimtab.passes.sparse_ffn import (
    Rest,
    RestNodes,
    RestOption,
    RowForm,
    Rows,
    SparseFFN,
    TokenDial,
    bars_token_dial,
    check_sparsity,
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

DIAL = "ffn_sparsity"


@dataclass(frozen=True)
class Choice:
    """Thresholds of one FFN and their measured effect.

    Attributes:
        sizes: computes the sizes of the blocks of neurons.
        table: thresholds as of `quantiles.thresholds`.
        threshold: threshold of the requested sparsity.
        often: share of the held-out states that compute each block, [blocks].
        error: squared error of the outputs on held-out states, relative to their variance, without the rest map.
        rest: the rest map, which approximates the neurons left out.
    """

    sizes: Sizes
    table: np.ndarray
    threshold: float
    often: np.ndarray
    error: float
    rest: Rest | None = None

    @property
    def density(self) -> float:
        """Share of the neurons that a token computes, on average."""
        return float(self.often.mean())


class FFNThreshold(Pass):
    """Leave out the neurons whose activations are below the layer's threshold, for each token.

    Gated FFNs compute the whole gate, and leave neurons out of up and down (CATS, arXiv 2404.08763). Other FFNs compute
    the whole up projection, and leave neurons out of down (TEAL, arXiv 2408.14690). Thresholds are quantiles on
    calibration data; nothing is trained.
    A `rest` adds a low-rank map of the input that approximates the neurons left out.
    Exact end of the dial: at 0 all neurons are computed.
    """

    name: ClassVar[str] = "ffn-threshold"
    summary: ClassVar[str] = "leave out the neurons whose activations are small for a token; no training (CATS, TEAL)"
    leaves_experts: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({FFNStates()})
    reads_layers: ClassVar[bool] = True

    sparsity: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="share of an FFN's neurons that is left out, on average; default of the dial",
    )
    by: Literal["contribution", "magnitude"] = Field(
        "contribution",
        description="what a threshold is compared with: what an activation adds to the output, or its size alone",
    )
    block: int = Field(1, ge=1, description="neighbouring neurons that are chosen together, by the sum of their sizes")
    cap: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of an FFN's neurons that a token may take, the best; below 1 no value of the dial is exact",
    )
    shared: bool = Field(False, description="all tokens of a call compute what any of them needs")
    weights: RowForm = Field("fp32", description="of the FFN's own weights")
    dense_above: int | None = Field(
        None, ge=0, description="calls with more tokens compute all neurons, whatever the dial; never, if not given"
    )
    most: float | None = Field(
        None, gt=0, le=1, description="FFNs that compute more on average stay dense; where that is slower, if not given"
    )
    rest: RestOption | None = Field(
        None, description="{rank: r}: a low-rank affine map of the input in place of the neurons that are left out"
    )
    max_error: float | None = error_bound()
    layers: tuple[int, ...] | None = Field(None, description="these FFNs alone, counted from 0")

    def dials(self) -> tuple[Dial, ...]:
        meaning = "share of an FFN's neurons that is left out, on average, those of the smallest activations"
        return (Dial(DIAL, meaning, 0.0, 1.0, self.sparsity, exact=0.0, fast=(1 + self.sparsity) / 2),)

    def bars(self, later: Pass) -> str | None:
        return bars_token_dial(later.name)

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        """Rewrite the FFNs of `graph`. Reads states of each from the Profile.

        Raises:
            RecipeError: an FFN cannot reach the requested sparsity.
        """
        anatomy = find_anatomy(graph)
        selected = select_ffns(anatomy, self.layers)
        profile = context.measured()
        raise_opset(graph, OPSET)
        left: list[Left] = []
        plans: list[tuple[Sequence[FFN], Choice]] = []  # without the layers, whose activations are large
        done = 0
        for group in by_weights(selected):
            reason = unfit(group[0], self.block, self.weights)
            if reason is None:
                layer = sample_ffn(group[0], profile, group[1:])
                choice = self._choose(layer)
                reason = self._not_worth(group[0], choice, len(selected), context)
                if reason is None:
                    plans.append((group, replace(choice, rest=self._rest(layer, choice))))
            if reason is not None:
                left += [Left(ffn.where, reason) for ffn in group]
            done += len(group)
            if context.progress is not None:
                context.progress("find thresholds", done, len(selected))
        rows = self._rewrite(graph, plans, left, context) if plans else []
        return rewritten(self.name, anatomy.ffns, rows, left, self.max_error)

    def taken(self, blocks: int) -> int:
        """Limit of the blocks that one token computes."""
        return max(1, round(self.cap * blocks))

    def _choose(self, layer: SampledFFN) -> Choice:
        """Thresholds of one FFN, and their measured effect.

        Raises:
            RecipeError: the FFN cannot reach the sparsity, since each token computes at least one block.
        """
        blocks = layer.ffn.d_ff // self.block
        check_sparsity(layer.ffn, self.sparsity, self.block, "block")
        weight = contributions(layer).astype(np.float32) if self.by == "contribution" else None
        sizes = Sizes(weight, self.block)
        table = thresholds(sizes.of(first_activations(layer, layer.fit)))
        threshold, max_blocks = threshold_at(table, self.sparsity), self.taken(blocks)
        taken = chosen(sizes.of(first_activations(layer, layer.held_out)), threshold, max_blocks)
        y = (layer.h_held_out * np.repeat(taken, self.block, 1)) @ layer.down
        return Choice(sizes, table, threshold, taken.mean(0), layer.error(y))

    def _rest(self, layer: SampledFFN, choice: Choice) -> Rest | None:
        """The rest map for the neurons left out; None if the option is not set or the map would not lower the error."""
        if self.rest is None:
            return None
        max_blocks = self.taken(layer.ffn.d_ff // self.block)
        return fit_rest(
            layer,
            lambda x: chosen(choice.sizes.of(first_activations(layer, x)), choice.threshold, max_blocks),
            self.rest.rank,
        )

    def _not_worth(self, ffn: FFN, choice: Choice, layers: int, context: PassContext) -> str | None:
        """Why the FFN stays dense, or None."""
        if self.most is not None:
            return too_dense(choice.density, self.most)
        crossover = self._crossover(ffn, layers, context)
        if crossover is None:
            return None
        load = Load.of_call(choice.often, context.tokens, shared=self.shared, dense_above=self.dense_above)
        return crossover.not_faster("its neurons", load, rest_bytes(ffn, self.rest) / ffn.params)

    def _crossover(self, ffn: FFN, layers: int, context: PassContext) -> Crossover | None:
        """The crossover of the projections behind the first one. The first one takes the same time in both forms."""
        if context.crossover is None:
            return None
        form = context.dense_form("ffn")
        shape = SparseShape(ffn.d_ff, ffn.d_model, 2, self.weights, self.block, layers, form, context.tokens)
        if not ffn.gated:  # chosen rows of one matrix are measured as those of a head are, which are chosen one by one
            shape = SparseShape(ffn.d_ff, ffn.d_model, 1, self.weights, dense=form, tokens=context.tokens)
        return context.crossover(shape)

    def _rewrite(
        self, graph: gs.Graph, plans: Sequence[tuple[Sequence[FFN], Choice]], left: list[Left],
        context: PassContext,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Replace FFNs by the sparse ops; returns the report's entry of each, and appends unchanged FFNs to `left`."""
        (dial,) = self.dials()
        tensor = context.add_dial(graph, dial)
        levels = Levels(graph, [choice.table for _, choice in plans], f"{self.name}/levels")
        emit = _Emit(self, graph, TokenDial(graph, tensor, f"{self.name}/dial"), levels)
        rows = []
        for place, (group, choice) in enumerate(plans):
            for ffn in group:
                row_or_reason = emit.replace(ffn, group[0], choice, place)
                if isinstance(row_or_reason, str):
                    left.append(Left(ffn.where, row_or_reason))
                else:
                    rows.append(row_or_reason)
        return rows


class _Emit:
    """Replaces FFNs by thresholds and sparse ops. Weights that several FFNs share are stored once."""

    def __init__(self, step: FFNThreshold, graph: gs.Graph, dial: TokenDial, levels: Levels) -> None:
        self._step, self._graph, self._dial, self._levels = step, graph, dial, levels
        self._rows = Rows(step.weights)
        self._stored: dict[int, tuple[SparseFFN, RestNodes | None]] = {}

    def replace(self, ffn: FFN, first: FFN, choice: Choice, place: int) -> dict[str, Any] | str:
        """Rewrite `ffn`, which shares the weights of `first`; returns the report's entry, or why `ffn` stays dense."""
        step, graph, at = self._step, self._graph, f"{self._step.name}/layer.{ffn.layer}"
        blocks, rest = ffn.d_ff // step.block, choice.rest
        k = step.taken(blocks)
        dense_above = -1 if step.dense_above is None else step.dense_above
        once = place not in self._stored
        if once:
            name, stand_in = f"{step.name}/layer.{first.layer}", None
            if rest is not None:
                stand_in = RestNodes(
                    rest, f"{name}/rest", blocks=blocks, taken=k, at_most=True, dense_above=dense_above
                )
            sparse = SparseFFN(first, FFNWeights(first), self._rows, step.block, name, first_whole=True)
            self._stored[place] = sparse, stand_in
        sparse, stand_in = self._stored[place]
        assert sparse.first is not None
        activations = sparse.first.emit(graph, ffn, at)
        sizes = self._sizes(activations, choice.sizes, at)
        above = self._dial.taken_off(sizes, ffn.x, at, lambda dial: self._levels.at(dial, place, at))
        if isinstance(above, str):
            return above
        numbers = add_node(
            graph, SELECT_BLOCKS, {"scores": above}, f"{at}/blocks", k=k, shared=int(step.shared), at_most=1,
            dense_above=dense_above,
        )  # fmt: skip
        sparse.put(graph, ffn, numbers, at, at_most=True, activations=activations, rest=stand_in)
        beside = rest.nbytes if rest is not None else 0
        row: dict[str, Any] = {
            "layer": ffn.layer, "neurons": ffn.d_ff, "of_each_block": step.block, "cap": k * step.block,
            "threshold": float(f"{choice.threshold:.4g}"), "sparsity": round(1 - choice.density, 4),
            "density": round(choice.density, 4), "error": round(choice.error, 4),
            "read_bytes": round(beside + sparse.read_bytes(choice.density * blocks)),
            "bytes": once * round(beside + sparse.nbytes), "dense_bytes": once * 4 * ffn.params,
        }  # fmt: skip
        if step.rest is not None:
            row |= report_rest(rest, int(once))
        return row | ({} if once else {"weights_of": first.layer})

    def _sizes(self, activations: gs.Variable, sizes: Sizes, at: str) -> gs.Variable:
        """Append the nodes that compute the sizes of the blocks, [..., blocks]."""
        graph, shape = self._graph, activations.shape
        sizes_of = insert(graph, "Abs", [activations], f"{at}/size", dtype=np.float32)
        sizes_of.shape = shape
        if sizes.weight is not None:
            weight = constant(f"{at}/size.weight", sizes.weight)
            sizes_of = insert(graph, "Mul", [sizes_of, weight], f"{at}/size.weighted", dtype=np.float32)
            sizes_of.shape = shape
        if sizes.block == 1 or shape is None:
            return sizes_of
        lead, blocks = len(shape) - 1, int(shape[-1]) // sizes.block
        parts = constant(f"{at}/size.parts", np.array([0] * lead + [blocks, sizes.block]))
        axis = constant(f"{at}/size.axis", np.array([lead + 1]))  # ONNX Runtime 1.31 keeps axis -1 of an empty tensor
        sizes_of = insert(graph, "Reshape", [sizes_of, parts], f"{at}/size.of_blocks", dtype=np.float32)
        sizes_of = insert(
            graph, "ReduceSum", [sizes_of, axis], f"{at}/size.sum", attrs={"keepdims": 0}, dtype=np.float32
        )
        sizes_of.shape = [*shape[:-1], blocks]
        return sizes_of
