"""Infers the shapes of intermediate tensors, and derives facts from them."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.importers.onnx_importer import (
    get_onnx_tensor_dtype,
    get_onnx_tensor_shape,
    get_onnx_tensor_type,
)

from trimtab.passes.canonicalize.runtime_schemas import register_runtime_schemas
from trimtab.passes.graph import topological, values
from trimtab.passes.graph.shapes import dim, entries
from trimtab.plugins import register_schemas

log = logging.getLogger(__name__)

_READ = 64  # maximum elements of a constant that shape inference reads


def infer_shapes(graph: gs.Graph) -> None:
    """Replace types and shapes of all intermediate tensors by those of ONNX shape inference, or by none.

    Weights are typed inputs of the inference, so that none is read. Ops of the dialect and of ONNX Runtime have rules
    of their own; for outputs of other domains' ops, the types in the file are used.
    """
    register_schemas()
    nodes = topological(graph)
    register_runtime_schemas({(n.domain or "", n.op, graph.opset if not n.domain else 1) for n in nodes})
    local = {(function.domain, function.name) for function in graph.functions}
    constants = {t.name: t for node in nodes for t in node.inputs if isinstance(t, gs.Constant) and t.dtype is not None}
    small = {name for name, t in constants.items() if int(np.prod(t.shape, dtype=np.int64)) <= _READ}
    foreign = [
        t
        for node in nodes
        if node.domain and (node.domain, node.op) not in local
        for t in node.outputs
        if t.name and t.dtype is not None
    ]
    proto = onnx.helper.make_graph(
        [OnnxExporter.export_node(node) for node in nodes],
        "shapes",
        [_info(t) for t in [*graph.inputs, *(t for name, t in constants.items() if name not in small)]],
        [_info(t) for t in graph.outputs],
        [onnx.numpy_helper.from_array(np.asarray(values(constants[name])), name) for name in sorted(small)],
        value_info=[_info(t) for t in foreign],
    )
    model = onnx.helper.make_model(
        proto, opset_imports=graph.import_domains, functions=[OnnxExporter.export_function(f) for f in graph.functions]
    )
    model.ir_version = graph.ir_version or model.ir_version
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph.value_info
    except onnx.shape_inference.InferenceError as error:
        log.info("shapes of intermediate tensors are not known: %s", error)
        inferred = []
    infos = {info.name: info for info in inferred}
    outputs = {id(t) for t in graph.outputs}
    for node in nodes:
        for tensor in node.outputs:
            if id(tensor) not in outputs:
                _take_over(tensor, infos.get(tensor.name))


def _take_over(tensor: gs.Tensor, info: onnx.ValueInfoProto | None) -> None:
    """Set the type and shape of `tensor` from `info`. A sequence has neither; only its kind is stored."""
    tensor.type = "tensor_type" if info is None else get_onnx_tensor_type(info) or "tensor_type"
    if tensor.type != "tensor_type":
        tensor.dtype = tensor.shape = None
        return
    tensor.dtype = tensor.dtype if info is None else get_onnx_tensor_dtype(info)
    tensor.shape = None if info is None else get_onnx_tensor_shape(info)


def _info(tensor: gs.Tensor) -> onnx.ValueInfoProto:
    return OnnxExporter.export_value_info_proto(tensor, do_type_check=False)


def same_shape(node: gs.Node) -> bool:
    """True if the Reshape `node` provably keeps the shape.

    A Reshape keeps the number of elements, so if all axes but one are equal, the last one is equal, too.
    """
    source = node.inputs[0]
    target = entries(node.inputs[1])
    if target is None or source.shape is None or len(target) != len(source.shape):
        return False
    copies = 0 if not node.attrs.get("allowzero", 0) else None
    return sum(entry != dim(source, axis) and entry != copies for axis, entry in enumerate(target)) <= 1
