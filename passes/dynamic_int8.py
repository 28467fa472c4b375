"""The pass `dynamic-int8`: ONNX Runtime's own dynamic quantization, as the last step of a recipe."""

from __future__ import annotations

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from pydantic import Field

from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.contract import Capability, Left, Pass, PassContext, PassResult, Rounding
from trimtab.passes.graph import is_external, load_graph, output_name_of, save_graph, stored_bytes
from trimtab.passes.graph.products import expose_weights, float_products

_INTEGER_PRODUCTS = frozenset(["ConvInteger", "DynamicQuantizeLSTM", "MatMulInteger", "QAttention"])
"""What the quantizer makes of products."""

_SEVEN_BITS, _EIGHT_BITS = 64, 127  # largest integer of a weight, as the quantizer has them


class DynamicInt8(Pass):
    """Store the remaining weights as int8 and quantize activations as they come, per tensor.

    What onnxruntime.quantization.quantize_dynamic does to a dense model, done to the compiled one. It stands after the
    passes that need weights in floating point. Weights behind a Transpose or a Cast are rounded too, and what layers
    share is rounded once. Where the target's products saturate, weights take seven bits.
    """

    name: ClassVar[str] = "dynamic-int8"
    summary: ClassVar[str] = "int8 products with activations quantized at run time (ONNX Runtime)"

    per_channel: bool = Field(True, description="a scale per output feature instead of one per matrix")

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        """Quantize `graph` in place. Reads all its weights into memory."""
        before = _integer_products(graph)
        expose_weights(graph, self.name)
        linears = [linear for ffn in find_anatomy(graph).ffns for linear in ffn.linears]
        weights = {t.name for linear in linears for t in (linear.weight, linear.bias) if t is not None}
        names = {node.outputs[0].name: output_name_of(node) for node in graph.nodes if node.outputs}
        reasons = dict(float_products(graph))
        with TemporaryDirectory(prefix="trimtab-int8-") as folder:
            source, result = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
            save_graph(graph, source)
            quantize_file(source, result, per_channel=self.per_channel, reduce_range=context.capability.saturates)
            quantized = load_graph(result)
            for tensor in quantized.tensors().values():
                if isinstance(tensor, gs.Constant) and is_external(tensor):
                    tensor.values = np.array(tensor.values)  # its file is about to go
        graph.nodes, graph.inputs, graph.outputs = quantized.nodes, quantized.inputs, quantized.outputs
        graph.opset, graph.import_domains = quantized.opset, quantized.import_domains
        # Its own names of outputs are those of before, so a product that stayed is found again.
        left = [Left(names.get(y, y), reasons.get(y, why)) for y, why in float_products(graph)]
        left += [Left(where, "it is in a branch or a loop") for where in _inner_products(graph)]
        ffn = [t for name, t in graph.tensors().items() if isinstance(t, gs.Constant) and _belongs(name, weights)]
        details: dict[str, Any] = {"float_products": len(left), "ffn_bytes": sum(stored_bytes(t) for t in ffn)}
        return PassResult(self.name, _integer_products(graph) - before, tuple(left), details)

    def unfit(self, capability: Capability) -> str | None:
        if capability.integer_products:
            return None
        return "it does not multiply integers whose scales are found at run time"

    def rounding(self, capability: Capability) -> Rounding:
        """The quantizer's: uint8 activations with one scale for the tensor, symmetric int8 weights."""
        return Rounding(_SEVEN_BITS if capability.saturates else _EIGHT_BITS, self.per_channel)


def _integer_products(graph: gs.Graph) -> int:
    return sum(node.op in _INTEGER_PRODUCTS for node in graph.nodes)


def _inner_products(graph: gs.Graph) -> list[str]:
    """Products with weights in the subgraphs of `graph`, which the quantizer does not look into."""
    return [
        output_name_of(node)
        for subgraph in graph.subgraphs(recursive=True)
        for node in subgraph.nodes
        if node.op in ("MatMul", "Gemm") and any(isinstance(tensor, gs.Constant) for tensor in node.inputs[:2])
    ]


def _belongs(name: str, weights: set[str]) -> bool:
    """True for FFN weights, the parts that quantization makes of them, and all that ffn-split made."""
    whole = name.removesuffix("_quantized").removesuffix("_scale").removesuffix("_zero_point")
    return whole in weights or name.startswith("ffn-split/")


def quantize_file(source: Path, result: Path, *, per_channel: bool = True, reduce_range: bool = False) -> None:
    """Write `source` as a user of ONNX Runtime would quantize it: int8 weights, activations quantized as they come.

    Args:
        reduce_range: weights of seven bits, as ONNX Runtime advises for processors whose products saturate.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.registry import IntegerOpsRegistry

    model = onnx.load(str(source))
    del model.graph.value_info[:]  # shapes that an exporter left stale make the quantizer fail
    # The quantizer goes by names: it would take ONNX's own Attention for com.microsoft's, which holds weights.
    attention = any(node.op_type == "Attention" and node.domain in ("", "ai.onnx") for node in model.graph.node)
    large = model.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises on the root logger to preprocess the model, which changes nothing here
    try:
        quantize_dynamic(
            model,
            result,
            per_channel=per_channel,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=[op for op in IntegerOpsRegistry if op != "Attention"] if attention else None,
            use_external_data_format=large,
            # ONNX infers no types behind ops of other domains, such as a decoder's attention.
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    finally:
        root.setLevel(level)
