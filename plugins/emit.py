"""Appends nodes of the dialect to a graph, and the reference bodies of their ops."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import dtype_to_onnx
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter

from trimtab.plugins.dialect import DOMAIN, OPSET, VERSION, Form, Op, Output, Shape, Value, onnx_type


def add_node(graph: gs.Graph, op: Op, inputs: Mapping[str, gs.Tensor], name: str, **attributes: Value) -> gs.Variable:
    """Append a node of `op` and return its output. The reference body is added to the graph's functions.

    Optional outputs stay unnamed; `add_multi_output_node` gives those.

    Args:
        inputs: inputs by name; omitted inputs must be optional.
        name: name of the node and its output.
        attributes: omitted attributes have their defaults.

    Raises:
        ValueError: no such input, attribute or choice; the op has several outputs; or the model already uses the op in
            a form with another body: of a model there can be but one, since functions go by name.
    """
    if any(not o.optional for o in op.outputs[1:]):
        raise ValueError(f"{op.name} has several outputs; add_multi_output_node returns them")
    return _append(graph, op, inputs, name, {op.outputs[0].name: name}, attributes)[0]


def add_multi_output_node(
    graph: gs.Graph,
    op: Op,
    inputs: Mapping[str, gs.Tensor],
    name: str,
    outputs: Collection[str] | None = None,
    **attributes: Value,
) -> tuple[gs.Variable, ...]:
    """`add_node` for an op with several outputs: returns the named outputs, in the op's order.

    Args:
        name: name of the node; its outputs are called <name>/<output>.
        outputs: outputs to name, by default all; the others must be optional.

    Raises:
        ValueError: as `add_node`; or no such output, or one that has to be named is not.
    """
    all_outputs = [o.name for o in op.outputs]
    named_outputs = all_outputs if outputs is None else outputs
    if odd := [o for o in named_outputs if o not in all_outputs]:
        raise ValueError(f"{op.name} has no output {odd[0]!r}; it has {', '.join(all_outputs)}")
    if missing := [o.name for o in op.outputs if not o.optional and o.name not in named_outputs]:
        raise ValueError(f"{op.name}: its output {missing[0]!r} has to be named")
    return _append(graph, op, inputs, name, {o: f"{name}/{o}" for o in all_outputs if o in named_outputs}, attributes)


def _append(
    graph: gs.Graph,
    op: Op,
    inputs: Mapping[str, gs.Tensor],
    name: str,
    named: Mapping[str, str],
    attributes: Mapping[str, Value],
) -> tuple[gs.Variable, ...]:
    """Append the node whose outputs are `named`; returns these."""
    whole = _attributes(op, inputs, attributes)
    kinds = {key: type_of(tensor) for key, tensor in inputs.items()}
    add_body(graph, op, Form(kinds, whole))
    domains = list(graph.import_domains or [onnx.helper.make_opsetid("", graph.opset)])
    if all(domain.domain != DOMAIN for domain in domains):
        graph.import_domains = [*domains, onnx.helper.make_opsetid(DOMAIN, VERSION)]
    shapes = op.shapes({i.name: _shape(inputs.get(i.name)) for i in op.inputs}, whole, name)
    outputs = [  # all of them, also unnamed ones at the end: ONNX Runtime refuses a node with fewer than its function
        _variable(named[o.name], _dtype(o, inputs), shapes[o.name]) if o.name in named else gs.Variable.empty()
        for o in op.outputs
    ]
    order = [inputs.get(i.name, gs.Variable.empty()) for i in op.inputs]
    graph.nodes.append(gs.Node(op.name, name=name, inputs=order, outputs=outputs, attrs=whole, domain=DOMAIN))
    return tuple(tensor for tensor in outputs if not tensor.is_empty())


def _attributes(op: Op, inputs: Mapping[str, gs.Tensor], attributes: Mapping[str, Value]) -> dict[str, Value]:
    """Check inputs and attributes against the op; returns all attributes of the node, with defaults."""
    known = {i.name for i in op.inputs}, {a.name for a in op.attributes}
    for given, names in zip((inputs, attributes), known, strict=True):
        for key in given:
            if key not in names:
                raise ValueError(f"{op.name} has no {key!r}; it has {', '.join(sorted(names))}")
    missing = [i.name for i in op.inputs if not i.optional and i.name not in inputs]
    if missing:
        raise ValueError(f"{op.name} needs {missing[0]!r}")
    whole = {a.name: attributes.get(a.name, a.default) for a in op.attributes}
    for attribute in op.attributes:
        if attribute.choices and whole[attribute.name] not in attribute.choices:
            raise ValueError(
                f"{op.name}: {attribute.name} is {whole[attribute.name]!r}, not one of {', '.join(attribute.choices)}"
            )
    return whole


def _variable(name: str, dtype: object, shape: Shape | None) -> gs.Variable:
    """Name unnamed sizes after the tensor."""
    named = None if shape is None else [f"{name}.{i}" if size is None else size for i, size in enumerate(shape)]
    return gs.Variable(name, dtype, named)


def _dtype(output: Output, inputs: Mapping[str, gs.Tensor]) -> object:
    if output.follows is None:
        return onnx.helper.tensor_dtype_to_np_dtype(onnx_type(output.type))
    dtype = inputs[output.follows].dtype
    return np.float32 if dtype is None else dtype


def add_body(graph: gs.Graph, op: Op, form: Form) -> None:
    """Add the reference body of `op` in this form to the graph's functions.

    Raises:
        ValueError: the model uses the op already, in a form with another body.
    """
    if graph.opset < OPSET:
        raise ValueError(f"{op.name} needs opset {OPSET}, the graph has {graph.opset}; raise it first")
    key = _form_key(op, form)
    for function in graph.functions:
        if (function.domain, function.name) == (DOMAIN, op.name):
            if function.doc_string != key:
                raise ValueError(f"the model uses {op.name} already, in another form")
            return
    proto = op.function(form, graph.opset)
    proto.doc_string = key
    graph.functions.append(OnnxImporter.import_function(proto, model_import_domains=graph.import_domains))


def _form_key(op: Op, form: Form) -> str:
    """The properties that nodes of an op must share to use one reference body."""
    strings = {key: value for key, value in form.attributes.items() if isinstance(value, str)}
    return f"{op.doc} Form: {sorted(form.given.items())} {sorted(strings.items())}"


def type_of(tensor: gs.Tensor) -> str:
    """ONNX's name of a tensor's type. A tensor without a type is float, like all tensors between a model's layers."""
    if tensor.dtype is None:
        return "tensor(float)"
    return f"tensor({onnx.TensorProto.DataType.Name(dtype_to_onnx(tensor.dtype)).lower()})"


def _shape(tensor: gs.Tensor | None) -> Shape | None:
    return None if tensor is None or tensor.shape is None else list(tensor.shape)
