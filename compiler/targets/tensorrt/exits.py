"""Lifts the exits out of a graph of packed tokens: samples then leave between two engines instead of inside one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.errors import TargetError
from trimtab.passes.graph import insert, output_name_of, topological
from trimtab.plugins import DOMAIN, KEEP_SAMPLES

ONE_ENGINE = "keep the exits inside one engine: `engine: {segments: 1}`"


@dataclass(frozen=True)
class Lifted:
    """One exit.

    Attributes:
        stays: name of a tensor of bool, [batch]: the samples that go on.
        outputs: output of the whole model → name of the tensor that holds it for samples that leave here.
        batched: tensors with a row for each sample that cross the exit.
        packed: tensors with a row for each token that cross the exit.
        offsets: the offsets of the packed tensors; None where there are none.
    """

    stays: str
    outputs: Mapping[str, str]
    batched: tuple[gs.Variable, ...]
    packed: tuple[gs.Variable, ...]
    offsets: gs.Variable | None

    @property
    def points(self) -> tuple[gs.Variable, ...]:
        """All tensors that cross the exit."""
        return (*self.batched, *self.packed, *([] if self.offsets is None else [self.offsets]))


def exits_in(graph: gs.Graph) -> list[gs.Node]:
    """The nodes that let samples leave, in the order in which they run."""
    return [node for node in topological(graph) if node.op == KEEP_SAMPLES.name and node.domain == DOMAIN]


def lift_exits(graph: gs.Graph) -> list[Lifted]:
    """Rewrite `graph` in place so that all samples go through all of it; returns the exits.

    Behind an exit, a Gather of the samples that stay, or of their rows, becomes Identity. Each output is built by
    ScatterND nodes: the last one writes the answers at the end, the others write the answers of exits. These answers,
    and the masks of samples that stay, become outputs behind the graph's own.

    Raises:
        TargetError: the exits do not have the form that `early-exit` writes; names the node.
    """
    keeps = exits_in(graph)
    answers = [_answers(graph, output, keeps) for output in graph.outputs]
    names = [output.name for output in graph.outputs]
    lifted = []
    for number, keep in enumerate(keeps):
        stay, rows, offsets = keep.outputs
        batched = [_passed_on(gather, stay) for gather in list(stay.outputs) if _gathers(gather, stay)]
        packed = [_passed_on(gather, rows) for gather in list(rows.outputs) if _gathers(gather, rows)]
        read = {i.name: tensor for i, tensor in zip(KEEP_SAMPLES.inputs, keep.inputs, strict=True)}
        keep.outputs = [stay, rows, gs.Variable.empty()]
        graph.nodes.append(gs.Node("Identity", f"{keep.name}/go_on", inputs=[read["offsets"]], outputs=[offsets]))
        stays = _stays(graph, read["uncertainty"], read["threshold"], keep.name)
        own = [each[number] for each in answers]
        graph.outputs += [stays, *own]
        outputs = {name: tensor.name for name, tensor in zip(names, own, strict=True)}
        lifted.append(Lifted(stays.name, outputs, tuple(batched), tuple(packed), offsets))
    for place, (name, each) in enumerate(zip(names, answers, strict=True)):
        old, last = graph.outputs[place], each[-1]
        old.name = f"{name}/placed"
        last.name, last.dtype, last.shape = name, old.dtype, old.shape
        graph.outputs[place] = last
    graph.cleanup(remove_unused_graph_inputs=False)
    graph.nodes = topological(graph)
    if remaining := exits_in(graph):
        users = [node for tensor in remaining[0].outputs for node in tensor.outputs]
        raise _odd(output_name_of(remaining[0]), f"{output_name_of(users[0])} reads which samples it lets go")
    return [_used(graph, exit_) for exit_ in lifted]


def _answers(graph: gs.Graph, output: gs.Tensor, keeps: Sequence[gs.Node]) -> list[gs.Variable]:
    """The tensors that each exit, and the end, give as `output`, for all samples that reach them."""
    answers: list[gs.Variable] = []
    tensor, casts = _before_casts(output)
    while tensor.inputs and tensor.inputs[0].op == "ScatterND":
        tensor, places, update = tensor.inputs[0].inputs
        source, own = _before_casts(update)
        # The exit whose samples reach this one.
        last = keeps[len(keeps) - len(answers) - 1] if len(answers) < len(keeps) else None
        if last is not None and not (places.inputs and _gathers(places.inputs[0], last.outputs[0])):
            raise _odd(output.name, f"{update.name} is not put at the places of the samples that come by")
        answers.append(_cast(graph, source, [*own, *casts]))
        tensor, more = _before_casts(tensor)
        casts = [*more, *casts]
    if len(answers) != len(keeps) + 1:
        raise _odd(output.name, f"{len(answers)} ScatterND put answers into it, of {len(keeps)} exits and the end")
    return answers[::-1]


def _before_casts(tensor: gs.Tensor) -> tuple[gs.Tensor, list[gs.Node]]:
    """The tensor before the Cast nodes that make `tensor`, and these nodes, the first one first."""
    casts: list[gs.Node] = []
    while tensor.inputs and tensor.inputs[0].op == "Cast":
        casts.insert(0, tensor.inputs[0])
        tensor = tensor.inputs[0].inputs[0]
    return tensor, casts


def _cast(graph: gs.Graph, tensor: gs.Variable, casts: Sequence[gs.Node]) -> gs.Variable:
    """`tensor` through copies of `casts`."""
    for number, cast in enumerate(casts):
        (result,) = cast.outputs
        name = f"{tensor.name}/cast.{number}"
        shape, tensor = tensor.shape, insert(graph, "Cast", [tensor], name, attrs=dict(cast.attrs), dtype=result.dtype)
        tensor.shape = shape
    return tensor


def _gathers(node: gs.Node, rows: gs.Tensor) -> bool:
    """Whether `node` gathers the rows `rows` of a tensor."""
    return node.op == "Gather" and node.inputs[1] is rows and int(node.attrs.get("axis", 0)) == 0


def _passed_on(gather: gs.Node, rows: gs.Tensor) -> gs.Variable:
    gather.op, gather.attrs = "Identity", {}
    gather.inputs = [tensor for tensor in gather.inputs if tensor is not rows]
    output: gs.Variable = gather.outputs[0]
    return output


def _stays(graph: gs.Graph, doubt: gs.Tensor, limit: gs.Tensor, name: str) -> gs.Variable:
    """The mask of samples that stay, as in KeepSamples: their doubt is not below the limit."""
    wide = [
        tensor
        if tensor.dtype == np.float32
        else insert(graph, "Cast", [tensor], f"{name}/{key}", attrs={"to": 1}, dtype=np.float32)
        for key, tensor in (("doubt", doubt), ("limit", limit))
    ]
    below = insert(graph, "Less", wide, f"{name}/below", dtype=np.bool_)
    stays = insert(graph, "Not", [below], f"{name}/stays", dtype=np.bool_)
    stays.shape = doubt.shape
    return stays


def _used(graph: gs.Graph, exit_: Lifted) -> Lifted:
    """`exit_` without the tensors that the graph no longer computes."""
    computed = {id(tensor) for node in graph.nodes for tensor in node.outputs}
    batched, packed = (tuple(t for t in side if id(t) in computed) for side in (exit_.batched, exit_.packed))
    offsets = exit_.offsets if id(exit_.offsets) in computed else None
    return Lifted(exit_.stays, exit_.outputs, batched, packed, offsets)


def _odd(where: str, why: str) -> TargetError:
    return TargetError(f"the model cannot be cut behind its exits: {where}: {why}", hint=ONE_ENGINE)
