"""Lowers ONNX's own Attention to the ops by which ONNX defines it.

TensorRT-RTX 1.7 has Attention kernels only for half precision, and its parser does not let the builder decompose the
op: a float32 build fails with "not supported by a dedicated kernel". In half precision the op stays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter

from trimtab.passes.errors import ModelError
from trimtab.plugins.lowering import Nodes, onnx_type, type_of


def is_wide(node: gs.Node) -> bool:
    """Whether `node` is ONNX's Attention in float32, for which no kernel exists."""
    return node.op == "Attention" and node.domain in (None, "", "ai.onnx") and type_of(node.inputs[0]) == np.float32


def attention(nodes: Nodes, node: gs.Node) -> list[gs.Tensor | None]:
    """The outputs of `node`, computed by the function body that its schema gives for its attributes and inputs."""
    query = node.inputs[0]
    if query.shape is None:
        raise ModelError(
            f"{node.name or node.outputs[0].name}: the rank of its query is not known",
            hint="export the model again",
        )
    opset = nodes.graph.opset
    types = [_type(tensor) for tensor in node.inputs]
    schema: Any = onnx.defs.get_schema(node.op, opset, "")  # onnx's stubs lack the method
    proto = OnnxExporter.export_node(node).SerializeToString()
    body = schema.get_context_dependent_function_with_opset_version(opset, proto, types)
    function = OnnxImporter.import_function(onnx.FunctionProto.FromString(body), model_opset=opset)
    arguments = {id(own): tensor for own, tensor in zip(function.inputs, node.inputs, strict=False)}
    computed: dict[int, gs.Tensor] = {}
    for each in function.nodes:
        each.name = nodes.next(each.op)
        each.inputs = [arguments.get(id(tensor), tensor) for tensor in each.inputs]
        for tensor in each.outputs:
            computed[id(tensor)] = tensor
            tensor.name = f"{each.name}/{tensor.name}"
        nodes.graph.nodes.append(each)
    for tensor, old in zip(function.outputs, node.outputs, strict=False):
        tensor.dtype, tensor.shape = type_of(query), old.shape
    return [computed.get(id(tensor)) for tensor in function.outputs[: len(node.outputs)]]


def _type(tensor: gs.Tensor) -> bytes:
    """The type of `tensor`, serialized for the schema; empty for an omitted input."""
    if not tensor.name:
        return b""
    return bytes(onnx.helper.make_tensor_type_proto(onnx_type(type_of(tensor)), tensor.shape).SerializeToString())
