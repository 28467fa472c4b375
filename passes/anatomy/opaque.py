"""Ops that hide parts of a model from passes: products in integers, and layers in branches or loops."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from trimtab.passes.anatomy.model import Unrecognized
from trimtab.passes.anatomy.scan import Scan, only_producer
from trimtab.passes.graph import output_name_of
from trimtab.passes.graph.linear import match_linear

_INTEGER_PRODUCTS = frozenset(
    ["DynamicQuantizeMatMul", "Int8Linear", "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QLinearMatMul"]
)
_PRODUCTS = frozenset(["Conv", "Gemm", "MatMul"])
_UNQUANTIZED = "give the model as it was before quantization"


def find_opaque(scan: Scan) -> list[Unrecognized]:
    """One entry per op that hides products with weights, with the number of products and the op's first node."""
    hidden: dict[tuple[str, str], list[gs.Node]] = {}
    for node in scan.nodes:
        for kind in _kinds(node):
            hidden.setdefault(kind, []).append(node)
    return [Unrecognized(op, output_name_of(nodes[0]), _why(op, kind, nodes)) for (op, kind), nodes in hidden.items()]


def _kinds(node: gs.Node) -> Iterator[tuple[str, str]]:
    """(op, how it hides its products)."""
    if node.op in _INTEGER_PRODUCTS:
        yield node.op, "integers"
    if node.op in _PRODUCTS and not node.domain and _reads_rounded(node):
        yield node.op, "Q/DQ"
    if _products_inside(node):
        yield node.op, "inside"


def _why(op: str, kind: str, nodes: list[gs.Node]) -> str:
    if kind == "integers":
        return f"{len(nodes)} products of quantized activations; {_UNQUANTIZED}"
    if kind == "Q/DQ":
        return (
            f"{len(nodes)} products whose activations are quantized, by QuantizeLinear and DequantizeLinear in front "
            f"of them (Q/DQ); {_UNQUANTIZED}"
        )
    count = sum(map(_products_inside, nodes))
    if op == "If":
        return (
            f"{count} products with weights are in its branches, which passes do not look into; give a model "
            "without them, such as a decoder before its forms with and without a cache were merged"
        )
    return f"{count} products with weights are in its body, which passes do not look into; export the model unrolled"


def _reads_rounded(product: gs.Node) -> bool:
    """Whether `product` reads activations that are quantized at run time and dequantized again."""
    back = (only_producer(tensor) for tensor in product.inputs[:2])
    there = (only_producer(node.inputs[0]) for node in back if node is not None and node.op == "DequantizeLinear")
    return any(node is not None and node.op == "QuantizeLinear" for node in there)


def _products_inside(node: gs.Node) -> int:
    """The number of products with weights in the branches or the body of `node`."""
    graphs = node.subgraphs(recursive=True)
    return sum(match_linear(inner) is not None for graph in graphs for inner in graph.nodes)
