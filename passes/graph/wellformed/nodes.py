"""Checks nodes of an ONNX file against the definitions of their ops: attributes, numbers of inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto

from trimtab.passes.graph.wellformed.fault import MalformedError, name_of

_FIELDS = {
    AttributeProto.TENSOR: "t", AttributeProto.GRAPH: "g", AttributeProto.SPARSE_TENSOR: "sparse_tensor",
    AttributeProto.TYPE_PROTO: "tp",
}  # fmt: skip
"""Types of attributes whose value is a message → its field. Writers leave out numbers of 0, empty strings and lists."""

_OWN = frozenset((s.domain, s.name, s.since_version) for s in onnx.defs.get_all_schemas_with_history())
"""The schemas of ONNX itself. Others are registered while trimtab runs, for shape inference alone."""


def check_node(node: NodeProto, opsets: Mapping[str, int], *, in_function: bool) -> None:
    """Check `node` against the definition of its op. Ops that onnx does not define are not checked.

    Args:
        opsets: domain → version.
        in_function: the node is in a function, so its attributes may refer to the function's.

    Raises:
        MalformedError: the message names the node and its fault.
    """
    if not node.op_type:
        raise MalformedError(f"{where(node)} has no op")
    schema = _schema(node.op_type, node.domain, opsets.get(node.domain, 0))
    definitions = schema.attributes if schema is not None else {}
    seen: set[str] = set()
    for attribute in node.attribute:
        label = f"attribute {name_of(attribute.name)} of {where(node)}"
        if attribute.name in seen:
            raise MalformedError(f"{label} is given twice")
        seen.add(attribute.name)
        if attribute.ref_attr_name:
            if not in_function:
                raise MalformedError(f"{label} refers to an attribute of a function, but is not in one")
        elif attribute.type == AttributeProto.UNDEFINED or not _has_value(attribute):
            raise MalformedError(f"{label} has no value")
        defined = definitions.get(attribute.name)
        if defined is not None and attribute.type != defined.type:
            raise MalformedError(f"{label} is of the wrong type")
    if schema is None:
        return
    missing = [name for name, attribute in definitions.items() if attribute.required and name not in seen]
    if missing:
        raise MalformedError(f"{where(node)} has no attribute {missing[0]!r}, which {node.op_type} needs")
    for what, names, minimum, maximum in (
        ("inputs", node.input, schema.min_input, schema.max_input),
        ("outputs", node.output, schema.min_output, schema.max_output),
    ):
        if not minimum <= len(names) <= maximum:
            raise MalformedError(
                f"{where(node)} has {len(names)} {what}, but {node.op_type} takes {_range(minimum, maximum)}"
            )
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    for parameter, name in zip(schema.inputs, node.input, strict=False):
        if not name and parameter.option != optional:
            raise MalformedError(f"{where(node)} has no input {parameter.name!r}, which {node.op_type} needs")


def where(node: NodeProto) -> str:
    """The node in messages: its op, and its name or its first output."""
    return f"{node.op_type[:60] or 'node'} {name_of(node.name or next(iter(node.output), ''))}"


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs among the attributes of `node`."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def tensors(node: NodeProto) -> Iterator[TensorProto]:
    """The tensors among the attributes of `node`."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR:
            yield attribute.t
        yield from attribute.tensors


def _has_value(attribute: AttributeProto) -> bool:
    field = _FIELDS.get(attribute.type)
    return field is None or attribute.HasField(field)


def _range(minimum: int, maximum: int) -> str:
    if minimum == maximum:
        return str(minimum)
    return f"{minimum} to {maximum}" if maximum < 1 << 20 else f"at least {minimum}"


@lru_cache(maxsize=4096)
def _schema(op: str, domain: str, version: int) -> onnx.defs.OpSchema | None:
    try:
        schema = onnx.defs.get_schema(op, version, domain)
    except onnx.defs.SchemaError:
        return None
    is_own = (schema.domain, schema.name, schema.since_version) in _OWN
    return schema if is_own and not schema.deprecated else None
