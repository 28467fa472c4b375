"""The pass `dynamic-int8`: dynamic quantization as the last step of a recipe, by rows or as ONNX Runtime does it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from pydantic import Field

from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.contract import Capability, Left, Pass, PassContext, PassResult, Rounding
from trimtab.passes.crossover import DenseForm
from trimtab.passes.graph import is_external, load_graph, output_name_of, save_graph, stored_bytes, topological
from trimtab.passes.graph.choosing import choosing_nodes
from trimtab.passes.graph.products import expose_weights, float_products
from trimtab.passes.graph.widen import widen
from trimtab.passes.hush import hushed
from trimtab.passes.int8_rows import to_int8_rows
from trimtab.passes.temporary import temporary_folder
from trimtab.plugins.int8_linear import INT8_LINEAR, LARGEST

_INTEGER_PRODUCTS = frozenset(["ConvInteger", "DynamicQuantizeLSTM", INT8_LINEAR.name, "MatMulInteger", "QAttention"])
"""Ops that quantized products become."""

INT8_OPS = ("Attention", "Conv", "EmbedLayerNormalization", "Gather", "LSTM", "MatMul")
"""Ops whose weights the quantizer rounds. It writes float32 scales for activations of any type."""

_WHOLE_TENSOR = ("Attention", "Conv", "LSTM")
"""Ops that the quantizer turns into products with one activation scale per tensor."""

_FFN_PREFIXES = ("ffn-route/", "ffn-split/", "ffn-threshold/", "ffn-topk/", "static-int8/")
"""Prefixes of constants' names that only parts of FFNs have."""

_CHOOSES = "it only chooses what is computed, which rounding would change"

_SEVEN_BITS, _EIGHT_BITS = 64, 127  # the quantizer's largest integer of a weight


class DynamicInt8(Pass):
    """Store the remaining weights as int8 and quantize activations at run time.

    `scales: row`: each token has its own scale, so a sample's answer does not depend on the rest of its batch. Products
    become Int8Linear, with their biases and activations. `scales: tensor`: ONNX Runtime's quantize_dynamic runs on the
    compiled model. If the target's products saturate, weights have seven bits.

    Products that only choose what is computed, such as routers, stay in floating point.
    The pass runs after the passes that need floating-point weights. Weights behind a Transpose or a Cast are rounded
    too. Weights that layers share are rounded once.
    """

    name: ClassVar[str] = "dynamic-int8"
    summary: ClassVar[str] = "int8 products with activations quantized at run time (ONNX Runtime)"
    leaves_experts: ClassVar[bool] = True

    per_channel: bool = Field(True, description="a scale per output feature instead of one per matrix")
    scales: Literal["auto", "row", "tensor"] = Field(
        "tensor",
        description="of activations: one per tensor, as ONNX Runtime has it, or one per row (token), nearer "
        "to the dense model; auto: row, where there is a kernel",
    )

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        """Quantize `graph` in place. Reads all its weights into memory."""
        before = _integer_products(graph)
        expose_weights(graph, self.name)
        weights = {t.name for ffn in find_anatomy(graph).ffns for linear in ffn.linears for t in linear.constants}
        names = {node.outputs[0].name: output_name_of(node) for node in graph.nodes if node.outputs}
        rows = self._by_rows(context.capability)
        choosing = choosing_nodes(graph)
        exact = {node.outputs[0].name for node in choosing if node.outputs}
        if rows:
            to_int8_rows(graph, self.name, per_channel=self.per_channel, leave=choosing)
            graph.cleanup(remove_unused_graph_inputs=False)
            graph.nodes = topological(graph)
        leave = (*_WHOLE_TENSOR, "MatMul") if rows else ()
        kept = {id(node) for node in choosing}
        taken = [n for n in graph.nodes if n.op in INT8_OPS and n.op not in leave and id(n) not in kept]
        own = [(node, output_name_of(node)) for node in taken]
        widen(graph, taken, self.name)
        names |= {node.outputs[0].name: name for node, name in own}  # `widen` gives the nodes new outputs
        reasons = {y: _CHOOSES if why and y in exact else why for y, why in float_products(graph)}
        whole = [
            output_name_of(node) for node in graph.nodes if rows and not node.domain and node.op in ("Conv", "LSTM")
        ]
        with temporary_folder("int8") as folder:
            source, result = folder / "model.onnx", folder / "int8.onnx"
            save_graph(graph, source)
            quantize_file(
                source,
                result,
                per_channel=self.per_channel,
                reduce_range=context.capability.saturates,
                leave=leave,
                leave_nodes=[node.name for node in choosing],
            )
            quantized = load_graph(result)
            for tensor in quantized.tensors().values():
                if isinstance(tensor, gs.Constant) and is_external(tensor):
                    tensor.values = np.array(tensor.values)  # the temporary file is deleted below
        graph.nodes, graph.inputs, graph.outputs = quantized.nodes, quantized.inputs, quantized.outputs
        graph.opset, graph.import_domains = quantized.opset, quantized.import_domains
        # The quantizer keeps the names of outputs, so a product that stayed float has its old name.
        floats = [(names.get(y, y), reasons.get(y, why)) for y, why in float_products(graph)]
        left = [Left(where, why) for where, why in floats if why is not None]
        unweighted = len(floats) - len(left)
        left += [Left(where, "it is in a branch or a loop") for where in _inner_products(graph)]
        left += [Left(where, "its integers would have one scale for the whole batch") for where in whole]
        ffn = [t for name, t in graph.tensors().items() if isinstance(t, gs.Constant) and _belongs(name, weights)]
        details: dict[str, Any] = {
            "float_products": len(left) + unweighted,
            "ffn_bytes": sum(stored_bytes(t) for t in ffn),
        }
        return PassResult(self.name, _integer_products(graph) - before, tuple(left), details)

    def bars(self, later: Pass) -> str | None:
        return "layers are not recognised in products of integers" if later.reads_layers else None

    def unfit(self, capability: Capability) -> str | None:
        if not capability.integer_products:
            return "it does not multiply integers whose scales are found at run time"
        if self.scales == "row" and not capability.row_scales:
            return (
                "scales by rows need trimtab's library of native kernels, on ONNX Runtime's CPU provider; "
                "`scales: tensor` does without"
            )
        return None

    def rounding(self, capability: Capability) -> Rounding:
        """Activations have 255 steps and one scale per row or tensor; weights are symmetric int8."""
        if self._by_rows(capability):
            return Rounding(LARGEST, self.per_channel, per_row=True)
        return Rounding(_SEVEN_BITS if capability.saturates else _EIGHT_BITS, self.per_channel)

    def dense_form(self, part: Literal["ffn", "head"], capability: Capability) -> DenseForm | None:
        return "int8-rows" if self._by_rows(capability) and capability.row_scales else "int8"

    def _by_rows(self, capability: Capability) -> bool:
        return self.scales == "row" or (self.scales == "auto" and capability.row_scales)


def _integer_products(graph: gs.Graph) -> int:
    return sum(node.op in _INTEGER_PRODUCTS for node in graph.nodes)


def _inner_products(graph: gs.Graph) -> list[str]:
    """Products with weights in the subgraphs of `graph`. The quantizer does not visit subgraphs."""
    return [
        output_name_of(node)
        for subgraph in graph.subgraphs(recursive=True)
        for node in subgraph.nodes
        if node.op in ("MatMul", "Gemm") and any(isinstance(tensor, gs.Constant) for tensor in node.inputs[:2])
    ]


def _belongs(name: str, weights: set[str]) -> bool:
    """True for FFN weights, their quantized parts, and constants that FFN passes added."""
    whole = name.removesuffix("_quantized").removesuffix("_scale").removesuffix("_zero_point")
    own = whole.removeprefix(f"{DynamicInt8.name}/").removesuffix("/float32")  # which half precision became
    return not weights.isdisjoint((name, whole, own)) or own.startswith(_FFN_PREFIXES)


def quantize_file(
    source: Path, result: Path, *, per_channel: bool = True, reduce_range: bool = False, leave: Collection[str] = (),
    leave_nodes: Collection[str] = (),
) -> None:  # fmt: skip
    """Quantize `source` with ONNX Runtime's quantizer: int8 weights, activations quantized at run time.

    Args:
        reduce_range: weights have seven bits, as ONNX Runtime advises for processors whose products saturate.
        leave: ops that stay in floating point.
        leave_nodes: names of nodes that stay in floating point.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.registry import IntegerOpsRegistry

    model = onnx.load(str(source))
    del model.graph.value_info[:]  # shapes that an exporter left stale make the quantizer fail
    # The quantizer compares op names only: it would take ONNX's own Attention for com.microsoft's, which has weights.
    if any(node.op_type == "Attention" and node.domain in ("", "ai.onnx") for node in model.graph.node):
        leave = (*leave, "Attention")
    large = model.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF
    with hushed(""):  # the quantizer logs the advice to preprocess the model, which changes nothing here
        quantize_dynamic(
            model,
            result,
            per_channel=per_channel,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=[op for op in IntegerOpsRegistry if op not in leave] if leave else None,
            nodes_to_exclude=list(leave_nodes),
            use_external_data_format=large,
            # ONNX infers no types behind ops of other domains, such as a decoder's attention.
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
