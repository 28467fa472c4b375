"""Graphs in half precision, run on a CPU: float16 by ONNX Runtime, bfloat16 in float32 with every tensor rounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from rewrite import session

from trimtab.passes import Capability, PassContext, PassResult, run_passes
from trimtab.passes.graph import save_graph
from trimtab.passes.precision import Precision

GPU = Capability(float16=True)


def parsed(text: str, opset: int = 18, **weights: np.ndarray) -> gs.Graph:
    """The graph of ONNX's textual form, with `weights` as initializers."""
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : {opset}]>' + text.replace(")  ", ")\n"))
    for name, array in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return gs.import_onnx(proto)


def in_half(
    graph: gs.Graph, folder: Path, *, capability: Capability = GPU, **options: Any
) -> tuple[ort.InferenceSession, PassResult]:
    """Run the pass over `graph`, and open what it makes."""
    folder.mkdir(exist_ok=True)
    step = Precision.model_validate(options)
    (result,) = run_passes(graph, [step], PassContext(capability=capability))
    save_graph(graph, folder / "half.onnx")
    return (session if step.type == "float16" else _emulated)(folder / "half.onnx"), result


def _emulated(path: Path) -> ort.InferenceSession:
    """ONNX Runtime's CPU has no kernels for bfloat16: tensors of that type become float32, rounded as they are made."""
    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    narrow = {name for name, kind in types.items() if kind == TensorProto.BFLOAT16}
    assert all(types.get(name) for node in graph.node for name in node.output if name), "a type is not known"
    for tensor in graph.initializer:
        _widen(tensor)
    nodes = []
    for node in graph.node:
        nodes.append(node)
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "output_dtype") and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
            _widen(attribute.t)
        for i, name in enumerate(node.output):
            if name in narrow:
                node.output[i] = f"{name}/wide"
                nodes.append(helper.make_node("Cast", [f"{name}/wide"], [f"{name}/bf"], to=TensorProto.BFLOAT16))
                nodes.append(helper.make_node("Cast", [f"{name}/bf"], [name], to=TensorProto.FLOAT))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    onnx.save(model, str(path.with_name("emulated.onnx")))
    return session(path.with_name("emulated.onnx"))


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == TensorProto.BFLOAT16:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
