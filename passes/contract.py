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
    """What a target's runtime can take, probed and never guessed from a version.

    Attributes:
        weight_bits: widths of blockwise integer weights that it multiplies with directly, such as {4, 8}.
        negative_scales: it multiplies with such weights of 4 bits whose scales may be negative.
        float16: it computes in half precision without falling back to float32.
        saturates: its products of uint8 and int8 overflow 16 bits on the way (x86 without VNNI), if weights are large.
        integer_products: it multiplies activations as integers, whose scales are found as they come.
        row_scales: it does so with a scale for each row, by the dialect's own kernel.
        int4_kernel: its int4 products in blocks are the dialect's own.
        glu_kernel: it computes act(gate) * up by the dialect's own op.
        counted_sizes: it runs nodes whose outputs have sizes that are counted at run time (NonZero, Compress).
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
    """How a pass will round the operands of products with weights, for training to learn with the error of it.

    Attributes:
        largest: weights become integers in [-largest, largest], symmetrically.
        per_channel: a scale per output feature instead of one per matrix.
        per_row: activations have a scale per row, which is a token, instead of one per tensor.
    """

    largest: int
    per_channel: bool
    per_row: bool = False


@dataclass
class PassContext:
    """All that a pass may know besides the graph: no data, no files, no network."""

    profile: Profile | None = None
    capability: Capability = field(default_factory=Capability)
    progress: Callable[[str, int, int], None] | None = None
    """Called with (what, done, total) by passes that take long."""
    crossover: Measure | None = None
    """Where the sparse form of a layer stops paying on the target, measured there; None where that is not known."""
    tokens: int = 1
    """Of a call, in all samples together, for which the engine is to be fastest."""
    shards: int = 1
    """Ranks among which the graph will be divided. What is chosen at run time, each has to choose of its own part."""
    done: list[Pass] = field(default_factory=list)
    """The passes that `run_passes` has run on this graph so far."""
    results: list[PassResult] = field(default_factory=list)
    """What each of them did."""
    ahead: Sequence[Pass] = ()
    """Those that it will run after the present one."""
    choices: dict[str, Any] = field(default_factory=dict)
    """What passes have searched for on this graph, for `ProfileInfo.choices`."""
    dials: dict[str, Dial] = field(default_factory=dict)
    """The dials that the graph has as inputs, by name."""

    def dense_form(self, part: Literal["ffn", "head"]) -> DenseForm:
        """What the passes ahead make of the weights of such a layer, if this one leaves it as it is."""
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
        """The profile, for passes that cannot do without.

        Raises:
            ProfileError: there is none.
        """
        if self.profile is None:
            raise ProfileError("a profile is needed", hint="give --data or --profile")
        return self.profile

    def choice(self, step: Pass, search: Callable[[], Any], fits: Callable[[Any], bool]) -> Any:
        """What the Profile says that `step` chose behind the same passes; or what `search` finds now. JSON types.

        A search may end otherwise on another machine, at a tie between two plans, and weights that were learned for the
        one do not fit the other.

        Args:
            fits: whether a choice of the Profile holds here.
        """
        key = json.dumps([s.written() for s in (*self.done, step)], sort_keys=True)
        known = self.profile.info.choices.get(key) if self.profile is not None else None
        taken = known is not None and fits(known)
        if taken:
            log.info("%s: as chosen before, says the profile", step.name)
        self.choices[key] = known if taken else search()
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
        name: of the pass.
        changed: number of places rewritten.
        left: the places it recognised and left alone.
        details: for the report; JSON types only.
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
    """kebab-case, as recipes call it."""
    summary: ClassVar[str]
    """One line for `trimtab passes`."""
    needs: ClassVar[frozenset[Need]] = frozenset()
    """What the pass takes from the Profile: measured by calibration, or learned by a method of `trimtab train`."""
    behind: ClassVar[tuple[str, ...]] = ()
    """Passes that stand in front of this one, since it works on what they make."""
    reads_layers: ClassVar[bool] = False
    """It works on whole layers, whose projections and sums it has to recognise, in float32."""

    leaves_experts: ClassVar[bool] = False
    """It makes FFNs cheaper, but not the experts of a mixture: its report names those that the graph has."""

    packs: ClassVar[bool] = False
    """Whether layers hand on rows of real tokens alone behind the pass, whose number is counted at run time."""

    def written(self) -> dict[str, Any]:
        """Name → options, as in a recipe; JSON types."""
        return {self.name: self.model_dump(mode="json")}

    @abstractmethod
    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        """Rewrite `graph` in place.

        At the exact end of the pass's dial the new graph computes the same as the old one.
        """

    def dials(self) -> tuple[Dial, ...]:
        """Numbers by which what the pass makes is turned while it runs; `run` adds them with `context.add_dial`."""
        return ()

    def needed(self) -> frozenset[Need]:
        """What the pass takes from the Profile with the options that it has: `needs`, where no option changes it."""
        return self.needs

    def check_profile(self, profile: Profile | None, before: Sequence[Pass]) -> None:
        """Check that the Profile has what the pass needs, as far as recipe and Profile tell: before anything long runs.

        Args:
            profile: None where one will be measured, if anything is to be measured.
            before: the passes in front of this one.

        Raises:
            NotLearnedError: the weights that the pass needs are not there, or belong behind other passes.
            ProfileError: `profile` is given, and was not calibrated for the pass.
        """
        for need in sorted(self.needed(), key=lambda need: (not isinstance(need, Learned), repr(need))):
            need.check(profile)

    def unfit(self, capability: Capability) -> str | None:
        """Why a target of this capability cannot run what the pass makes, told before any work; None where it can."""
        return None

    def unsuited(self, task: str | None) -> str | None:
        """Why the pass does not go with a model of this task, where files tell what graphs do not; None where it does.

        Args:
            task: "classes" (one for each sample), "labels" (any number of them), "score" or another kind; None where it
                is not known.
        """
        return None

    def bars(self, later: Pass) -> str | None:
        """Why `later` cannot run behind this pass, told when the recipe is read; None where it can."""
        return None

    def dense_form(self, part: Literal["ffn", "head"], capability: Capability) -> DenseForm | None:
        """The form that the pass gives the weights of layers in floating point; None where it leaves it."""
        return None

    def rounding(self, capability: Capability) -> Rounding | None:
        """What the pass does to products in floating point, beyond the rewrite: nothing, for most."""
        return None


def check_needs(passes: Sequence[Pass], profile: Profile | None) -> None:
    """Check that `profile` has what `passes` need, where it is given; and what they need to have learned in any case.

    Raises:
        NotLearnedError, ProfileError: names the first pass that lacks what training learns, since that also measures
            what is missing; else the first that lacks anything.
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
    """How the first of `passes` that rounds products will round them; None where none does."""
    found = (step.rounding(capability) for step in passes)
    return next((rounding for rounding in found if rounding is not None), None)


def _told(result: PassResult, earlier: Sequence[PassResult]) -> PassResult:
    """`result`, with a reason where earlier passes have left the pass nothing that it recognises."""
    names = [each.name for each in earlier if each.changed and each.name != "canonicalize"]
    if result.changed or result.left or not names:
        return result
    why = f"it recognises nothing to change behind {', '.join(names)}; if it should, put it in front"
    return replace(result, left=(Left("the model", why),))


def _experts(graph: gs.Graph) -> Iterator[Left]:
    """The mixtures of experts in `graph`, as a pass leaves them."""
    return (Left(f"experts at node {each.where}", each.why_left) for each in find_experts(graph.nodes))


def run_passes(graph: gs.Graph, passes: Sequence[Pass], context: PassContext) -> list[PassResult]:
    """Run `passes` in order over `graph`, in place.

    Raises:
        PassError: names the failing pass and those that ran before it.
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
        result = _told(result, context.results)
        log.info("%s: %d changed, %d left", step.name, result.changed, len(result.left))
        for left in result.left:
            log.debug("%s: left %s: %s", step.name, left.where, left.why)
        context.results.append(result)
        context.done.append(step)
    return context.results
