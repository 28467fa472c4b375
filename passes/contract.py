"""What a pass is: frozen options, a declared need, and a rewrite that reports what it changed and what it left."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from pydantic import BaseModel, ConfigDict

from trimtab.passes.anatomy.experts import find_experts
from trimtab.passes.crossover import DenseForm, Measure
from trimtab.passes.dials import Dial
from trimtab.passes.errors import NotLearnedError, PassError, ProfileError
from trimtab.passes.graph.order import topological
from trimtab.passes.needs import Learned, Need
from trimtab.passes.profile import Profile

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Capability:
    """What a target's runtime supports. Values are probed, never guessed from a version.

    Attributes:
        weight_bits: bit widths of blockwise integer weights with products of their own, such as {4, 8}.
        negative_scales: 4-bit weights may have negative scales.
        float16: products in half precision run without falling back to float32.
        saturates: products of uint8 and int8 overflow 16-bit sums if weights are large (x86 without VNNI).
        integer_products: supports int8 products whose activation scales are computed at run time.
        row_scales: supports such products with one scale per row, by the dialect's own kernel.
        int4_kernel: blockwise int4 products use the dialect's own kernel.
        glu_kernel: the dialect's own op computes act(gate) * up.
        counted_sizes: supports nodes whose output sizes are known only at run time (NonZero, Compress).
    """

    weight_bits: frozenset[int] = frozenset({4, 8})
    negative_scales: bool = False
    float16: bool = False
    saturates: bool = False
    integer_products: bool = True
    row_scales: bool = False
    int4_kernel: bool = False
    glu_kernel: bool = False
    counted_sizes: bool = True


@dataclass(frozen=True)
class Rounding:
    """How a pass will round the operands of products with weights. Training simulates the rounding.

    Attributes:
        largest: weights become integers in [-largest, largest].
        per_channel: weights have one scale per output feature instead of one per matrix.
        per_row: activations have one scale per row (token) instead of one per tensor.
    """

    largest: int
    per_channel: bool
    per_row: bool = False


@dataclass
class PassContext:
    """All that a pass may know besides the graph. A pass reads no data, files or network."""

    profile: Profile | None = None
    capability: Capability = field(default_factory=Capability)
    progress: Callable[[str, int, int], None] | None = None
    """Slow passes call it with (what, done, total)."""
    crossover: Measure | None = None
    """Measures on the target up to which density the sparse form of a layer is faster; None without a target."""
    tokens: int = 1
    """Tokens of one call, over all samples, for which the engine is optimized."""
    shards: int = 1
    """Ranks among which the graph will be divided. Each rank chooses neurons within its own part at run time."""
    done: list[Pass] = field(default_factory=list)
    """The passes that `run_passes` has run on this graph so far."""
    results: list[PassResult] = field(default_factory=list)
    """The results of the passes in `done`."""
    ahead: Sequence[Pass] = ()
    """The passes that run after the current one."""
    choices: dict[str, Any] = field(default_factory=dict)
    """Results of the passes' searches on this graph, stored in `ProfileInfo.choices`."""
    dials: dict[str, Dial] = field(default_factory=dict)
    """The graph's dial inputs by name."""

    def dense_form(self, part: Literal["ffn", "head"]) -> DenseForm:
        """The form that later passes give a layer's weights if this pass leaves the layer dense."""
        forms = (step.dense_form(part, self.capability) for step in self.ahead)
        return next((form for form in forms if form is not None), "fp32")

    def add_dial(self, graph: gs.Graph, dial: Dial) -> gs.Variable:
        """Give `graph` the input of `dial`, float32 [batch], with the batch of the graph's first input.

        Raises:
            ValueError: the graph has an input or a dial of that name already.
        """
        if any(tensor.name == dial.name for tensor in graph.inputs):
            raise ValueError(f"the graph has an input {dial.name!r} already, so it cannot be a dial")
        tensor = gs.Variable(dial.name, np.float32, [graph.inputs[0].shape[0]])
        graph.inputs.append(tensor)
        self.dials[dial.name] = dial
        return tensor

    def measured(self) -> Profile:
        """The profile, for passes that require one.

        Raises:
            ProfileError: there is no profile.
        """
        if self.profile is None:
            raise ProfileError("a profile is needed", hint="give --data or --profile")
        return self.profile

    def choice(self, step: Pass, search: Callable[[], Any], fits: Callable[[Any], bool]) -> Any:
        """The choice that the Profile stores for `step` after the same passes, else the result of `search`; JSON types.

        A search is not repeated, because a tie between two plans may end otherwise on another machine, and weights that
        were learned for one plan do not fit the other.

        Args:
            fits: returns whether a stored choice is valid for this graph.
        """
        key = json.dumps([s.written() for s in (*self.done, step)], sort_keys=True)
        stored = self.profile.info.choices.get(key) if self.profile is not None else None
        reuse = stored is not None and fits(stored)
        if reuse:
            log.info("%s: uses the choice stored in the profile", step.name)
        self.choices[key] = stored if reuse else search()
        return self.choices[key]


@dataclass(frozen=True)
class Left:
    """A place a pass left alone, and why."""

    where: str
    why: str


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        name: name of the pass.
        changed: number of places rewritten.
        left: places that the pass recognised and did not change.
        details: entries of the report; JSON types only.
    """

    name: str
    changed: int
    left: tuple[Left, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


class Pass(BaseModel, ABC):
    """A rewrite of the graph. Its fields are its options: one object feeds recipe, command line, tuning and cache key.

    A field's constraints are its bounds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    name: ClassVar[str]
    """Name in recipes, kebab-case."""
    summary: ClassVar[str]
    """One line for `trimtab passes`."""
    needs: ClassVar[frozenset[Need]] = frozenset()
    """What the pass reads from the Profile: measured by calibration, or learned by a method of `trimtab train`."""
    behind: ClassVar[tuple[str, ...]] = ()
    """Passes that have to run before this one, because it works on their output."""
    reads_layers: ClassVar[bool] = False
    """Whether the pass has to recognise whole layers, with projections and sums in float32."""

    leaves_experts: ClassVar[bool] = False
    """Whether the pass makes FFNs cheaper, but not the experts of a mixture. Its report then names the experts."""

    packs: ClassVar[bool] = False
    """Whether tensors between layers hold only real tokens after the pass; their number is known at run time."""

    def written(self) -> dict[str, Any]:
        """The pass as a recipe writes it, name → options; JSON types."""
        return {self.name: self.model_dump(mode="json")}

    @abstractmethod
    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        """Rewrite `graph` in place.

        At the exact end of the pass's dial the new graph computes the same as the old one.
        """

    def dials(self) -> tuple[Dial, ...]:
        """Numbers that tune the compiled model at run time; `run` adds them with `context.add_dial`."""
        return ()

    def needed(self) -> frozenset[Need]:
        """What the pass reads from the Profile with its current options; `needs` unless an option changes it."""
        return self.needs

    def check_profile(self, profile: Profile | None, before: Sequence[Pass]) -> None:
        """Check that the Profile has what the pass needs. The check reads recipe and Profile, not the model.

        Args:
            profile: None if calibration will run first.
            before: the passes that run before this one.

        Raises:
            NotLearnedError: the Profile has no weights for the pass, or they were learned after other passes.
            ProfileError: `profile` was not calibrated for the pass.
        """
        for need in sorted(self.needed(), key=lambda need: (not isinstance(need, Learned), repr(need))):
            need.check(profile)

    def unfit(self, capability: Capability) -> str | None:
        """Why a target of this capability cannot run the pass's output, or None. Checked before any work."""
        return None

    def unsuited(self, task: str | None) -> str | None:
        """Why the pass does not suit a model of this task, or None. The task is read from files beside the graph.

        Args:
            task: "classes" (one per sample), "labels" (any number per sample), "score" or another kind; None if the
                task is unknown.
        """
        return None

    def bars(self, later: Pass) -> str | None:
        """Why `later` cannot run after this pass, or None. Checked when the recipe is read."""
        return None

    def dense_form(self, part: Literal["ffn", "head"], capability: Capability) -> DenseForm | None:
        """The form that the pass gives the weights of floating-point layers; None if it does not change them."""
        return None

    def rounding(self, capability: Capability) -> Rounding | None:
        """How the pass rounds the operands of floating-point products; None if it does not round them."""
        return None


def check_needs(passes: Sequence[Pass], profile: Profile | None) -> None:
    """Check that `profile` has what `passes` need. Without a profile, only learned weights count as missing.

    Raises:
        NotLearnedError, ProfileError: names the first pass whose learned weights are missing, because training also
            measures statistics; else the first pass whose statistics are missing.
    """
    problems = [problem for number, step in enumerate(passes) if (problem := _problem(step, profile, passes[:number]))]
    if problems:
        raise next((problem for problem in problems if isinstance(problem, NotLearnedError)), problems[0])


def _problem(step: Pass, profile: Profile | None, before: Sequence[Pass]) -> ProfileError | None:
    try:
        step.check_profile(profile, before)
    except NotLearnedError as error:
        return NotLearnedError(f"pass {step.name}: {error.message}", method=error.method)
    except ProfileError as error:
        return ProfileError(f"pass {step.name}: {error.message}", hint=error.hint)
    return None


def first_rounding(passes: Sequence[Pass], capability: Capability) -> Rounding | None:
    """The rounding of the first of `passes` that rounds products; None if no pass does."""
    roundings = (step.rounding(capability) for step in passes)
    return next((rounding for rounding in roundings if rounding is not None), None)


def _with_reason(result: PassResult, earlier: Sequence[PassResult]) -> PassResult:
    """`result`, with a reason if the pass recognises nothing after the earlier passes' changes."""
    names = [each.name for each in earlier if each.changed and each.name != "canonicalize"]
    if result.changed or result.left or not names:
        return result
    why = f"it recognises nothing to change behind {', '.join(names)}; if it should, put it in front"
    return replace(result, left=(Left("the model", why),))


def _experts(graph: gs.Graph) -> Iterator[Left]:
    """The mixtures of experts in `graph`, as places that a pass does not change."""
    return (Left(f"experts at node {each.where}", each.why_left) for each in find_experts(graph.nodes))


def run_passes(graph: gs.Graph, passes: Sequence[Pass], context: PassContext) -> list[PassResult]:
    """Run `passes` in order over `graph`, in place.

    Raises:
        PassError: a pass failed. It names the pass and the passes that ran before.
    """
    context.done, context.results = [], []
    for number, step in enumerate(passes, 1):
        context.ahead = passes[number:]
        try:
            result = step.run(graph, context)
            graph.cleanup(remove_unused_graph_inputs=False)
            graph.nodes = topological(graph)
        except Exception as error:
            raise PassError(step.name, [r.name for r in context.results], error) from error
        if step.leaves_experts:
            result = replace(result, left=(*result.left, *_experts(graph)))
        result = _with_reason(result, context.results)
        log.info("%s: %d changed, %d left", step.name, result.changed, len(result.left))
        for left in result.left:
            log.debug("%s: left %s: %s", step.name, left.where, left.why)
        context.results.append(result)
        context.done.append(step)
    return context.results
