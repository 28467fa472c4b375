"""Cuts a model behind its exits: its parts, the hook between them, and the optimization profiles of each part."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import onnx_graphsurgeon as gs

from trimtab.compiler.targets.segmented.route import Route
from trimtab.compiler.targets.tensorrt.exits import ONE_ENGINE, Lifted
from trimtab.compiler.targets.tensorrt.info import ExitPoint, ExitsInfo
from trimtab.compiler.targets.tensorrt.profiles import Profile
from trimtab.compiler.targets.tensorrt.segments import cut_at
from trimtab.compiler.targets.tensorrt.sizes import sizes_at
from trimtab.compiler.workload import Shape, Workload
from trimtab.passes.errors import TargetError
from trimtab.passes.graph import topological
from trimtab.passes.graph.packed_batch import bias_of
from trimtab.plugins import PACKED_ATTENTION

Levels = tuple[int, int, int]
"""The sizes of one axis, (min, opt, max)."""

Shapes = tuple[Shape, Shape, Shape]
"""(min, opt, max) shape of a tensor."""


def cut_behind(
    graph: gs.Graph,
    exits: Sequence[Lifted],
    inputs: Mapping[str, bool],
    outputs: Sequence[str],
    biases: Collection[str] = (),
) -> tuple[list[gs.Graph], ExitsInfo]:
    """Cut `graph` into parts, one more than there are exits.

    Args:
        exits: the exits that were lifted out of the graph.
        inputs: input of the whole model → whether its first axis is the batch.
        outputs: outputs of the whole model.
        biases: names of biases by position, which are the same for all samples.

    Raises:
        TargetError: a tensor that `exits` do not name crosses an exit.
    """
    parts = cut_at(graph, [point for each in exits for point in each.points])
    info = ExitsInfo(
        points=tuple(ExitPoint(after=n, stays=e.stays, outputs=dict(e.outputs)) for n, e in enumerate(exits)),
        batched=(*(t.name for e in exits for t in e.batched), *(name for name, batched in inputs.items() if batched)),
        packed={t.name: e.offsets.name for e in exits if e.offsets is not None for t in e.packed},
        common=(*biases, *(name for name, batched in inputs.items() if not batched)),
    )
    if len(parts) != len(exits) + 1:
        raise TargetError(f"{len(exits)} exits cut the model into {len(parts)} parts", hint=ONE_ENGINE)
    hook = info.hook()
    sides = [([t.name for t in part.inputs], [t.name for t in part.outputs]) for part in parts]
    try:
        between = [hook.reads(number) for number in range(len(parts))]
        hook.check(Route.of(sides, list(inputs), outputs, between=between, companions=hook.companions))
    except (ValueError, TargetError) as error:
        raise TargetError(f"the model cannot be cut behind its exits: {error}", hint=ONE_ENGINE) from error
    return parts, info


def rows_of_tokens(graph: gs.Graph, profile: Profile, workload: Workload) -> Levels:
    """(min, opt, max) rows of a packed batch: 0 at least, and at most the rows of the padded batch.

    Args:
        graph: the graph, before the dialect is lowered.

    Raises:
        TargetError: the rows do not follow from the inputs' shapes.
    """
    if any("tokens" in axes for axes in workload.axes(graph).values()):
        return 0, workload.batch[1] * workload.tokens[1], workload.batch[2] * workload.tokens[2]
    attention = next(node for node in topological(graph) if node.op == PACKED_ATTENTION.name)
    at = ({name: levels[level] for name, levels in profile.shapes.items()} for level in (1, 2))
    packed_shapes = [sizes_at(graph, shapes).get(attention.inputs[0].name) for shapes in at]
    if packed_shapes[0] is None or packed_shapes[1] is None:
        raise TargetError("the number of tokens of a sample does not follow from the inputs' shapes", hint=ONE_ENGINE)
    return 0, packed_shapes[0][0], packed_shapes[1][0]


def biases_in(graph: gs.Graph, profile: Profile) -> dict[str, Shapes]:
    """Tensor → (min, opt, max) shape, for the biases by position in the attentions of `graph`.

    Args:
        graph: the graph, before the dialect is lowered.

    Raises:
        TargetError: a shape cannot be inferred.
    """
    attentions = [node for node in topological(graph) if node.op == PACKED_ATTENTION.name]
    biases = {bias.name: bias for node in attentions if isinstance(bias := bias_of(node), gs.Variable)}
    at = ({name: levels[level] for name, levels in profile.shapes.items()} for level in range(3))
    levels = [sizes_at(graph, shapes) for shapes in at] if biases else []
    shapes_of: dict[str, Shapes] = {}
    for name in biases:
        low, opt, high = (level.get(name) for level in levels)
        if low is None or opt is None or high is None:
            raise TargetError(f"the bias by position {name!r} has no shape that can be inferred", hint=ONE_ENGINE)
        shapes_of[name] = low, opt, high
    return shapes_of


def profile_behind(
    inputs: Sequence[gs.Tensor], profile: Profile, exits: ExitsInfo, rows: Levels, biases: Mapping[str, Shapes]
) -> Profile:
    """`profile` of the whole model, for the part behind an exit with these `inputs`.

    The inputs' dynamic axes get names. At least one sample goes on.

    Args:
        rows: (min, opt, max) rows of packed tokens.
        biases: the result of `biases_in`.

    Raises:
        TargetError: the width of an input cannot be inferred.
    """
    batched_shapes = next(shapes for name, shapes in profile.shapes.items() if name in exits.batched)
    batch: Levels = (1, batched_shapes[1][0], batched_shapes[2][0])
    ends: Levels = (2, batch[1] + 1, batch[2] + 1)
    shapes_of: dict[str, Shapes] = {}
    for tensor in inputs:
        if tensor.name in profile.shapes:
            low, opt, high = profile.shapes[tensor.name]
            shapes_of[tensor.name] = ((1, *low[1:]) if tensor.name in exits.batched else low, opt, high)
            continue
        if tensor.name in biases:
            low, _, high = shapes_of[tensor.name] = biases[tensor.name]
            tensor.shape = [
                a if a == b else f"{tensor.name}.{i}" for i, (a, b) in enumerate(zip(low, high, strict=True))
            ]
            continue
        offsets = tensor.name in exits.packed.values()
        first = ends if offsets else rows if tensor.name in exits.packed else batch
        tail = [] if offsets else None if tensor.shape is None else list(tensor.shape[1:])
        if tail is None or not all(isinstance(size, int) for size in tail):
            raise TargetError(f"{tensor.name!r}, which goes on behind an exit, has no known width", hint=ONE_ENGINE)
        shapes_of[tensor.name] = (first[0], *tail), (first[1], *tail), (first[2], *tail)
        tensor.shape = [f"{tensor.name}.0", *tail]
    return Profile(profile.name, shapes_of)
