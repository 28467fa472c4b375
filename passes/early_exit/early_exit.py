"""The pass `early-exit`: samples leave at an exit between two layers that is sure of them; others continue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from pydantic import Field

from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.anatomy.model import Block
from trimtab.passes.contract import Left, Pass, PassContext, PassResult
from trimtab.passes.dials import Dial
from trimtab.passes.early_exit.doubt import Criterion, Doubt
from trimtab.passes.early_exit.heads import ExitHead, exits_of
from trimtab.passes.errors import ModelError, NotLearnedError, RecipeError
from trimtab.passes.graph import constant, insert, rename_output
from trimtab.passes.graph.packed_batch import (
    bias_of,
    offsets_of,
    packed_attentions,
    readers_behind,
    reread,
    rows_of,
    strangers,
    why_all,
)
from trimtab.passes.needs import Learned, Need
from trimtab.passes.profile import Profile
from trimtab.plugins import KEEP_SAMPLES, add_multi_output_node

DIAL = "exit_threshold"
LAYERS_RUN = "exit_layer"
_METHOD = "magic-pyramid"


class EarlyExit(Pass):
    """Samples leave at the first exit whose doubt is below the dial (FastBERT, arXiv 2004.02178).

    The graph has no branch. An exit stores the answers of all samples, and gathers the rows of the samples that stay.
    The rest of the graph computes these rows, which may be none. The pass needs packed tokens, which `unpad` provides.
    """

    name: ClassVar[str] = "early-exit"
    summary: ClassVar[str] = "samples leave at the first exit that is sure of them; a dial says how sure"
    needs: ClassVar[frozenset[Need]] = frozenset({Learned(_METHOD)})
    behind: ClassVar[tuple[str, ...]] = ("unpad",)
    reads_layers: ClassVar[bool] = True

    threshold: float = Field(0.1, ge=0, le=1, description="default of the dial: doubt below which a sample leaves")
    criterion: Criterion = Field(
        "entropy",
        description="what doubt is: the answer's entropy over a uniform one's, 1 less the likeliest probability, or "
        "1 / n for n exits in a row that agree",
    )
    after: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="numbers of layers behind which there is an exit, 0 for the one in front of the first layer; by "
        "default all that the profile has",
    )
    report: bool = Field(True, description="give the model an output: the number of layers that each sample ran")

    def dials(self) -> tuple[Dial, ...]:
        meaning = f"doubt ({self.criterion}) below which a sample leaves early"
        return (Dial(DIAL, meaning, 0.0, 1.0, self.threshold, exact=0.0, fast=1.0),)

    def unsuited(self, task: str | None) -> str | None:
        return {
            "labels": "doubt is of one class among all, and this model gives a sample any number of labels",
            "score": "doubt is of one class among two classes or more, and this model gives a score",
        }.get(task or "")

    def bars(self, later: Pass) -> str | None:
        if later.name in ("ffn-route", "ffn-threshold"):
            return "its dial knows nothing of samples that have left"
        return "it prunes layers whose samples have left" if later.name == "token-prune" else None

    def check_profile(self, profile: Profile | None, before: Sequence[Pass]) -> None:
        super().check_profile(profile, before)
        assert profile is not None
        exits = exits_of(profile.learned(_METHOD))
        if not exits:
            raise NotLearnedError("the profile has no exits: their stage was left out", method=_METHOD)
        if missing := [number for number in self.after or () if number not in exits]:
            raise RecipeError(
                f"early-exit.after: the profile has no exit behind {missing[0]} layers",
                hint=f"it has exits behind {', '.join(map(str, exits))} layers",
            )

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        """Insert the exits of the Profile into `graph`, in place.

        Raises:
            ModelError: the model is no classifier of packed tokens, or has fewer layers than the exits need.
        """
        anatomy = find_anatomy(graph)
        logits = _logits(graph)
        attentions = packed_attentions(graph, self.name, context.results)
        learned = exits_of(context.measured().learned(_METHOD))
        selected = list(learned) if self.after is None else sorted(set(self.after))
        blocks = anatomy.blocks
        if len(attentions) != len(blocks):
            raise ModelError(f"{len(attentions)} attentions of packed tokens in {len(blocks)} layers that were found")
        if selected and selected[-1] >= len(blocks):
            raise ModelError(
                f"an exit behind {selected[-1]} layers of a model in which {len(blocks)} layers were found",
                hint=f"exits can be behind 0 to {len(blocks) - 1} layers",
            )
        classes = int(logits.shape[-1])
        width = _width(blocks)
        heads = [ExitHead(number, learned[number], width, classes) for number in selected]
        before = [tensor for tensor in graph.inputs if tensor.name in context.dials]
        batch = _Batch(graph, [context.add_dial(graph, self.dials()[0]), *before], attentions, logits)
        doubt = Doubt(self.criterion, classes)
        left: list[Left] = []
        for head in heads:
            reason = batch.leave(blocks[head.after], head, doubt, f"{self.name}/after.{head.after}")
            if reason is not None:
                left.append(Left(f"exit behind {head.after} layers", reason))
        if heads and len(left) == len(heads):
            raise ModelError(
                f"no sample can leave this model early: {left[-1].where}: {left[-1].why}",
                hint="take early-exit out of the recipe; unpad works without it",
            )
        batch.finish(len(blocks), self.report, self.name)
        details: dict[str, Any] = {"criterion": self.criterion, "exits": [head.after for head in heads]}
        return PassResult(self.name, len(heads) - len(left), tuple(left), details)


class _Batch:
    """The samples that have not left yet, and the answers of all samples.

    Args:
        dials: the dials of the graph, [batch] each; the first one is the threshold.
        attentions: attention nodes of the layers.
    """

    def __init__(
        self, graph: gs.Graph, dials: Sequence[gs.Tensor], attentions: Sequence[gs.Node], logits: gs.Variable
    ) -> None:
        self._graph, self._logits, self._attentions = graph, logits, attentions
        self._dials = list(dials)
        self._start(EarlyExit.name)

    def _start(self, name: str) -> None:
        """Initial state: no sample has left, and no sample has an answer."""
        graph = self._graph

        def number(key: str, value: object, dtype: type = np.int64) -> gs.Constant:
            return constant(f"{name}/{key}", np.asarray(value, dtype))

        def node(op: str, inputs: list[gs.Tensor], key: str, dtype: object = np.int64, **attrs: object) -> gs.Variable:
            return insert(graph, op, inputs, f"{name}/{key}", attrs=attrs, dtype=dtype)

        batch, one = node("Shape", [self._dials[0]], "batch"), number("row", [1])
        numbers = node("Range", [number("first", 0), node("Squeeze", [batch], "samples"), number("next", 1)], "numbers")
        self._places = node("Unsqueeze", [numbers, one], "places")  # batch indices of the remaining samples, [left, 1]
        self._places.shape = [(self._dials[0].shape or [None])[0], 1]
        shape = node("Concat", [batch, one], "rows", axis=0)
        nothing = number("no_answer", np.zeros((1, int(self._logits.shape[-1]))), np.float32)
        self._answers = node("Expand", [nothing, shape], "answers_none", np.float32)
        self._layers = node("Expand", [number("no_layer", [0], np.int32), batch], "layers_none", np.int32)

    def leave(self, block: Block, head: ExitHead, doubt: Doubt, name: str) -> str | None:
        """Insert an exit before `block`; returns the reason if samples cannot leave there."""
        graph, x = self._graph, block.x
        offsets = offsets_of(self._attentions[head.after])
        behind = readers_behind(graph, x)
        biases = [bias for node in self._attentions if (bias := bias_of(node)) is not None]  # one for all samples
        own = {id(tensor): tensor for tensor in (x, offsets, *self._dials, *biases)}
        others = strangers(graph, behind, own, name)
        if others:
            return why_all(graph, behind, others[0])
        answers = head(graph, x, offsets, f"{name}/head")
        unsure = doubt(graph, answers, f"{name}/doubt")
        inputs = {"uncertainty": unsure, "threshold": self._dials[0], "offsets": offsets, "x": x}
        stay, rows, stay_offsets = add_multi_output_node(graph, KEEP_SAMPLES, inputs, f"{name}/exit")
        self._answer(answers, head.after, name)
        dials = [rows_of(graph, dial, stay, f"{name}/dial.{i}") for i, dial in enumerate(self._dials)]
        instead = {id(old): new for old, new in zip(self._dials, dials, strict=True)}
        reread(behind, instead | {id(x): rows_of(graph, x, rows, f"{name}/x"), id(offsets): stay_offsets})
        self._dials = dials
        self._places = rows_of(graph, self._places, stay, f"{name}/places")
        doubt.counts = [rows_of(graph, count, stay, f"{name}/count.{i}") for i, count in enumerate(doubt.counts)]
        return None

    def _answer(self, answers: gs.Tensor, layers: int, name: str) -> None:
        """Store `answers` for the samples that have not left. Later exits overwrite the answers of those that stay."""
        graph = self._graph
        count = insert(graph, "Shape", [self._dials[0]], f"{name}/many", dtype=np.int64)
        number = constant(f"{name}/number", np.array([layers], np.int32))
        ran = insert(graph, "Expand", [number, count], f"{name}/each", dtype=np.int32)
        ran.shape = list(self._dials[0].shape)
        self._answers = self._put(self._answers, answers, f"{name}/known")
        self._layers = self._put(self._layers, ran, f"{name}/layers")

    def _put(self, stored: gs.Variable, new: gs.Tensor, name: str) -> gs.Variable:
        return insert(self._graph, "ScatterND", [stored, self._places, new], name, dtype=stored.dtype)

    def finish(self, layers: int, report: bool, name: str) -> None:
        """Store the answers of the last layer, and set the graph's outputs."""
        logits, batch = self._logits, self._graph.inputs[0].shape[0]
        self._answer(logits, layers, f"{name}/last")
        shape = list(logits.shape)
        rename_output(self._graph, logits, self._answers)
        logits.shape = [self._places.shape[0], *shape[1:]]
        if report:
            self._layers.name, self._layers.shape = LAYERS_RUN, [batch]
            self._graph.outputs.append(self._layers)


def _width(blocks: Sequence[Block]) -> int:
    """Width of the residual stream, which queries are projected from. Behind attention it may have been pruned."""
    queries = [block.attention.q for block in blocks if block.attention is not None and block.attention.q is not None]
    if not queries:
        raise ModelError("no projection of the queries was recognised in any layer")
    return queries[0].in_features


def _logits(graph: gs.Graph) -> gs.Variable:
    """The model's one output, [batch, classes].

    Raises:
        ModelError: the model has other outputs, or is no classifier.
    """
    names = [tensor.name for tensor in graph.outputs]
    if names != ["logits"]:
        raise ModelError(
            f"early-exit needs a classifier whose one output is 'logits', and this model gives {', '.join(names)}",
            hint="export the classifier without further outputs",
        )
    (logits,) = graph.outputs
    shape = list(logits.shape or [])
    if len(shape) != 2 or not isinstance(shape[-1], int) or shape[-1] < 2:
        raise ModelError(
            f"early-exit needs logits [batch, classes] of two classes or more; this model gives {shape}",
            hint="a score, a text or an answer for each token has no classes that an exit could be sure of",
        )
    return logits
