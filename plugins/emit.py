"""Nodes of the dialect in a graph, each model with the reference bodies of the ops that it uses."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import dtype_to_onnx
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter

from trimtab.plugins.dialect import DOMAIN, OPSET, VERSION, Form, Op, Shape, Value


def add_node(graph: gs.Graph, op: Op, inputs: Mapping[str, gs.Tensor], name: str, **attributes: Value) -> gs.Variable:
    """Append a node of `op` and return its output; the reference body goes into the graph's functions.

    Args:
        inputs: by name; those left out must be optional.
        name: of the node and its output.
        attributes: those left out take their defaults.

    Raises:
        ValueError: no such input, attribute or choice, or the model already uses the op in a form with another body:
            of a model there can be but one, since functions go by name.
    """
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
    kinds = {key: type_of(tensor) for key, tensor in inputs.items()}
    add_body(graph, op, Form(kinds, whole))
    domains = list(graph.import_domains or [onnx.helper.make_opsetid("", graph.opset)])
    if all(domain.domain != DOMAIN for domain in domains):
        graph.import_domains = [*domains, onnx.helper.make_opsetid(DOMAIN, VERSION)]
    order = [inputs.get(i.name, gs.Variable.empty()) for i in op.inputs]
    shapes = {i.name: _shape(inputs.get(i.name)) for i in op.inputs}
    inferred = op.shape(shapes, whole)
    shape = None if inferred is None else [f"{name}.{i}" if size is None else size for i, size in enumerate(inferred)]
    kind = np.int32 if op.follows is None else inputs[op.follows].dtype
    output = gs.Variable(name, np.float32 if kind is None else kind, shape)
    graph.nodes.append(gs.Node(op.name, name=name, inputs=order, outputs=[output], attrs=whole, domain=DOMAIN))
    return output


def add_body(graph: gs.Graph, op: Op, form: Form) -> None:
    """Put the reference body of `op` in this form among the graph's functions.

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
    """What two nodes of an op must have in common to share a reference body."""
    strings = {key: value for key, value in form.attributes.items() if isinstance(value, str)}
    return f"{op.doc} Form: {sorted(form.given.items())} {sorted(strings.items())}"


def type_of(tensor: gs.Tensor) -> str:
    """ONNX's name of a tensor's type. What has none yet is float, as everything between the layers of a model is."""
    if tensor.dtype is None:
        return "tensor(float)"
    return f"tensor({onnx.TensorProto.DataType.Name(dtype_to_onnx(tensor.dtype)).lower()})"


def _shape(tensor: gs.Tensor | None) -> Shape | None:
    return None if tensor is None or tensor.shape is None else list(tensor.shape)
