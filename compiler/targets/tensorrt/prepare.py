"""Turns a build's graph into ONNX files that TensorRT's parser takes: lowered and cut, with optimization profiles."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.inliner
import onnx_graphsurgeon as gs

from trimtab.compiler.targets.tensorrt.exit_parts import biases_in, cut_behind, profile_behind, rows_of_tokens
from trimtab.compiler.targets.tensorrt.exits import exits_in, lift_exits
from trimtab.compiler.targets.tensorrt.info import ExitsInfo
from trimtab.compiler.targets.tensorrt.profiles import Profile, profiles_of, tokens_of
from trimtab.compiler.targets.tensorrt.segments import segments_of
from trimtab.compiler.targets.tensorrt.sizes import sizes_at
from trimtab.compiler.workload import Workload
from trimtab.passes.canonicalize.heads import size_caches
from trimtab.passes.errors import TargetError
from trimtab.passes.graph import load_graph, save_graph
from trimtab.passes.graph import scratch as scratch_file
from trimtab.passes.graph.io import WeightFile
from trimtab.passes.lower import lower
from trimtab.plugins import DOMAIN

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """The input of the builder.

    Attributes:
        models: ONNX files, in the order in which their engines run.
        profiles: optimization profiles of each model.
        plugins: names of the dialect's plugins that the models use.
        lowered: op → number of its nodes that were replaced by standard ops.
        inputs, outputs: names of the whole model's inputs and outputs, in order.
        exits: exits between the models; None without exits.
    """

    models: list[Path]
    profiles: list[list[Profile]]
    plugins: tuple[str, ...]
    lowered: dict[str, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    exits: ExitsInfo | None = None


def prepare(model: Path, workload: Workload, scratch: Path, *, plugins: bool, segments: int | None = None) -> Prepared:
    """Write the builder's ONNX files into `scratch`; a model that needs no change is not copied.

    Args:
        plugins: whether plugins run trimtab's own ops, as far as there are kernels for them.
        segments: number of engines to cut the model into, between layers. None: one engine, or one more than exits.

    Raises:
        ModelError: an op has no form that the target takes; names the node.
        RecipeError: the workload does not cover the inputs.
        TargetError: the model cannot be cut this way, or a package that plugins need is missing.
    """
    with scratch_file(scratch):
        return _prepare(model, workload, scratch, plugins, segments)


def _prepare(model: Path, workload: Workload, scratch: Path, plugins: bool, segments: int | None) -> Prepared:
    graph = load_graph(model)
    inputs, outputs = (tuple(tensor.name for tensor in side) for side in (graph.inputs, graph.outputs))
    size_caches(graph)  # otherwise a symbol for the width of heads would need a range in the workload
    profiles = profiles_of(graph, workload)  # first, so that a fault of the workload shows before long work
    leaving = exits_in(graph)
    if leaving and segments is not None and segments > 1:
        raise TargetError(
            f"engine.segments: {segments} engines of a model whose samples leave at {len(leaving)} exits",
            hint="remove engine.segments to get an engine up to each exit and one for the rest, or set it to 1",
        )
    exits = lift_exits(graph) if leaving and segments is None else []
    sizes = [(rows_of_tokens(graph, p, workload), biases_in(graph, p)) for p in profiles] if exits else []
    used = _with_plugins(graph) if plugins else ()
    lowered = lower(graph, tokens=tokens_of(graph, workload))
    if not (lowered or used or exits or graph.functions) and segments in (None, 1):
        return Prepared([model], [profiles], (), lowered, inputs, outputs)
    between = None
    if exits:
        batched = {name: axes[:1] == ("batch",) for name, axes in workload.axes(graph).items()}
        parts, between = cut_behind(graph, exits, batched, outputs, sizes[0][1])
        whole = [[part_profile(parts[0].inputs, profile, graph) for profile in profiles]]
        each = list(zip(profiles, sizes, strict=True))
        whole += [[profile_behind(part.inputs, p, between, *size) for p, size in each] for part in parts[1:]]
    else:
        parts = segments_of(graph, segments or 1)
        whole = [[part_profile(part.inputs, profile, graph) for profile in profiles] for part in parts]
    paths = [scratch / f"model.{number}.onnx" for number in range(len(parts))]
    with WeightFile(scratch / "model.data") as weights:
        for part, path in zip(parts, paths, strict=True):
            save_graph(part, path, weights=weights)
            _inline_bodies(path)
    return Prepared(paths, whole, used, lowered, inputs, outputs, between)


def _inline_bodies(path: Path) -> None:
    """Replace the dialect's nodes by their reference bodies, in the ONNX file at `path`.

    TensorRT-RTX 1.7 does not take a node that omits an input of its function.
    """
    model = onnx.load(str(path), load_external_data=False)
    bodies = [(function.domain, function.name) for function in model.functions if function.domain == DOMAIN]
    if bodies:
        path.write_bytes(onnx.inliner.inline_selected_functions(model, bodies).SerializeToString())


def _with_plugins(graph: gs.Graph) -> tuple[str, ...]:
    """Turn the dialect's nodes into plugins; returns the plugins' names. Nodes without a kernel stay, to be lowered."""
    parts = (graph, *graph.subgraphs(recursive=True))
    if all(node.domain != DOMAIN for part in parts for node in part.nodes):
        return ()
    from trimtab.plugins.tensorrt import prepare as as_plugins

    try:
        conversion = as_plugins(graph)
    except RuntimeError as error:
        raise TargetError(f"the sparse ops cannot be built as plugins ({error})") from error
    for name, reason in conversion.left.items():
        log.warning("%s becomes standard ops: %s", name, reason)
    return conversion.plugins


def part_profile(inputs: Sequence[gs.Tensor], profile: Profile, graph: gs.Graph) -> Profile:
    """`profile` of the whole `graph`, for a part of it with these `inputs`.

    The inputs' dynamic axes get names. Shape inference gives the sizes of tensors from earlier parts.

    Raises:
        TargetError: shape inference gives no size.
    """
    internal = [tensor for tensor in inputs if tensor.name not in profile.shapes]
    at = ({name: each[level] for name, each in profile.shapes.items()} for level in range(3))
    levels = [sizes_at(graph, shapes) for shapes in at] if internal else []
    shapes = dict(profile.shapes)
    for tensor in internal:
        level_shapes = [level[tensor.name] for level in levels if tensor.name in level]
        if len(level_shapes) < len(levels):
            raise TargetError(
                f"engine.segments: {tensor.name!r}, which would cross a cut, has no shape that can be inferred",
                hint="build it as one engine",
            )
        low, _, high = shapes[tensor.name] = level_shapes[0], level_shapes[1], level_shapes[2]
        declared = tensor.shape or [None] * len(low)
        fixed = [a == b and isinstance(n, int) for a, b, n in zip(low, high, declared, strict=True)]
        tensor.shape = [a if same else f"{tensor.name}.{i}" for i, (a, same) in enumerate(zip(low, fixed, strict=True))]
    return Profile(profile.name, {tensor.name: shapes[tensor.name] for tensor in inputs})
