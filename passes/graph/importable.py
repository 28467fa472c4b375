"""Prepares an ONNX model for onnx-graphsurgeon 0.6: rewrites, stores apart or refuses what its Graph cannot represent.

graphsurgeon identifies a function only by domain and name, fails on sparse weights and optional types, silently drops
attributes of some kinds, and does not store a model's metadata.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TypeProto

from trimtab.passes.errors import ModelError
from trimtab.passes.graph.densify import densify

_SKIPPED = frozenset([
    AttributeProto.GRAPHS, AttributeProto.SPARSE_TENSOR, AttributeProto.SPARSE_TENSORS, AttributeProto.TENSORS,
    AttributeProto.TYPE_PROTO, AttributeProto.TYPE_PROTOS,
])  # fmt: skip
"""Kinds of attributes that graphsurgeon drops."""

_TENSOR = ("tensor_type", None)
"""The kinds of a tensor's type; None if the file states no type."""


@dataclass(frozen=True)
class ModelInfo:
    """The fields of a model beside its graph. Sessions return `metadata` as `custom_metadata_map`."""

    metadata: tuple[tuple[str, str], ...]
    version: int
    domain: str
    doc: str

    @classmethod
    def of(cls, model: ModelProto) -> ModelInfo:
        entries = tuple((entry.key, entry.value) for entry in model.metadata_props)
        return cls(entries, model.model_version, model.domain, model.doc_string)

    def write(self, model: ModelProto) -> None:
        onnx.helper.set_model_props(model, dict(self.metadata))
        model.model_version, model.domain, model.doc_string = self.version, self.domain, self.doc


def shorten_domain(model: ModelProto) -> None:
    """Write the domain of ONNX's own ops as "" wherever it is "ai.onnx": both names mean the same."""
    imports = [model.opset_import, *(function.opset_import for function in model.functions)]
    for each in chain(_nodes(model), *imports):
        if each.domain == "ai.onnx":
            each.domain = ""


def make_importable(model: ModelProto, path: str) -> None:
    """Rewrite `model` in place, so that graphsurgeon drops nothing that matters.

    Sparse weights become dense. Each overload of a function gets a name of its own. Types of intermediate sequences
    are removed; shape inference computes them again.

    Args:
        path: the path of the model, for messages.

    Raises:
        ModelError: the graph that passes rewrite cannot represent a part of the model; the message names the part.
    """
    try:
        _prepare(model)
        _separate_overloads(model)
    except ModelError as error:
        raise ModelError(f"{path}: {error.message}", hint=error.hint) from None
    for graph in _graphs(model):
        tensors = [value for value in graph.value_info if value.type.WhichOneof("value") in _TENSOR]
        del graph.value_info[:]
        graph.value_info.extend(tensors)


def _prepare(model: ModelProto) -> None:
    """Make sparse weights dense, and raise a ModelError for parts that the graph cannot represent."""
    _check_ends(model.graph)
    for graph in _graphs(model):
        _prepare_graph(graph)
    for node in _nodes(model):
        _check_attributes(node)


def _check_ends(graph: GraphProto) -> None:
    for what, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            if value.type.WhichOneof("value") not in _TENSOR:
                raise ModelError(
                    f"the {what} {value.name!r} is of {_kind(value.type)} type, and trimtab's engines read and "
                    "write only tensors",
                    hint="export the model with tensors for its inputs and outputs",
                )


def _check_attributes(node: NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.type in _SKIPPED:
            raise ModelError(
                f"the attribute {attribute.name!r} of node {node.name or node.op_type} ({node.op_type}) is of kind "
                f"{AttributeProto.AttributeType.Name(attribute.type)}, which trimtab does not carry",
                hint="export the model without this node",
            )


def _prepare_graph(graph: GraphProto) -> None:
    """Make sparse weights dense, and raise a ModelError for types that the graph cannot represent."""
    densify(graph)
    for value in chain(graph.input, graph.output):
        kind = value.type.WhichOneof("value")
        of_tensors = kind == "sequence_type" and value.type.sequence_type.elem_type.HasField("tensor_type")
        if kind not in _TENSOR and not of_tensors:
            raise ModelError(
                f"{value.name!r} in the branch or loop {graph.name!r} is of {_kind(value.type)} type, which trimtab "
                "does not carry",
                hint="export the model with tensors in its branches and loops",
            )


def _separate_overloads(model: ModelProto) -> None:
    """Give each overload of a function a name of its own, and rename the nodes that call it."""
    taken = {(function.domain, function.name) for function in model.functions}
    names: dict[tuple[str, str, str], str] = {}
    for function in model.functions:
        if function.overload:
            name = f"{function.name}_{function.overload}"
            while (function.domain, name) in taken:
                name += "_"
            taken.add((function.domain, name))
            names[function.domain, function.name, function.overload] = name
    for node in _nodes(model):
        if node.overload:
            key = (node.domain, node.op_type, node.overload)
            if key not in names:
                raise ModelError(
                    f"node {node.name or node.op_type} calls the overload {node.overload!r} of {node.op_type}, "
                    "which the model does not define",
                    hint="export the model again",
                )
            node.op_type = names[key]
            node.ClearField("overload")
    for function in model.functions:
        if function.overload:
            function.name = names[function.domain, function.name, function.overload]
            function.ClearField("overload")


def _graphs(model: ModelProto) -> Iterator[GraphProto]:
    """The graph of `model`, and the subgraphs in its nodes and in the nodes of its functions."""
    yield model.graph
    pending: list[Sequence[NodeProto]] = [model.graph.node, *(function.node for function in model.functions)]
    while pending:
        for node in pending.pop():
            for attribute in node.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    yield attribute.g
                    pending.append(attribute.g.node)


def _nodes(model: ModelProto) -> Iterator[NodeProto]:
    for graph in _graphs(model):
        yield from graph.node
    for function in model.functions:
        yield from function.node


def _kind(type_: TypeProto) -> str:
    """The kind of a type, such as "optional"."""
    return str(type_.WhichOneof("value")).removesuffix("_type").replace("_", " ")
