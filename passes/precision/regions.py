"""Which nodes may compute in half precision, and which stay in float32."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from trimtab.passes.graph import topological, values
from trimtab.passes.graph.cut import reads
from trimtab.plugins import DOMAIN, OPS

KEPT = frozenset([
    "CumSum", "DynamicQuantizeLinear", "Exp", "Log", "Pow", "Range", "Reciprocal", "ReduceL1", "ReduceL2",
    "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceSum", "ReduceSumSquare", "Resize", "Sin", "Cos", "Sqrt",
    "TopK", "NonMaxSuppression", "RoiAlign",
])  # fmt: skip
"""Sums over many, powers and their roots (the statistics of norms, where an exporter spells them out), angles of
positions, choices: what onnxconverter-common and TensorRT's guides keep in float32 too. LayerNormalization,
RMSNormalization and Softmax sum in float32 by themselves."""

_FOREIGN = frozenset([
    "Attention", "BiasGelu", "FastGelu", "FusedMatMul", "Gelu", "GroupQueryAttention", "MatMulNBits",
    "MultiHeadAttention", "QuickGelu", "RotaryEmbedding", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
])  # fmt: skip
"""Ops of com.microsoft that take half precision."""

_SMALL = 1024  # elements of a constant that is no weight
_INTEGER_PRODUCTS = ("ConvInteger", "MatMulInteger")
_LARGEST = float(np.finfo(np.float16).max)
MASK = 1e30
"""From here on a number is no weight, but stands for minus infinity."""


def is_float(tensor: gs.Tensor) -> bool:
    """Whether `tensor` is float32. What has no type is: everything between the layers of a model is."""
    if not tensor.name:
        return False
    if tensor.dtype is None:
        return True
    try:
        return bool(np.dtype(tensor.dtype) == np.float32)
    except TypeError:  # a type that numpy lacks, by ONNX's number
        return bool(tensor.dtype == onnx.TensorProto.FLOAT)


def half_nodes(graph: gs.Graph, extra: Collection[str], *, dialect: bool, narrow: bool) -> list[gs.Node]:
    """Nodes of `graph` that compute in float32 and may do so in half precision.

    Args:
        extra: further ops that stay.
        dialect: trimtab's ops may.
        narrow: the type holds no more than float16 does, so nodes with larger weights stay.
    """
    nodes = [node for node in topological(graph) if any(map(is_float, (*node.inputs, *node.outputs)))]
    kept = {id(node) for node in nodes if _stays(node, extra, dialect) or (narrow and _overflows(node))}
    for node in nodes:  # sums of integer products need the range of float32 until they are scaled
        if node.op == "Cast" and node.inputs[0].inputs and node.inputs[0].inputs[0].op in _INTEGER_PRODUCTS:
            kept |= {id(node), *(id(reader) for reader in node.outputs[0].outputs if reader.op == "Mul")}
    between = _between(graph, nodes, kept)
    captured = {id(t) for node in nodes for t in _captured(node)}
    inside = {id(node) for node in nodes if any(id(t) in captured for t in node.outputs)}
    return [node for node in nodes if id(node) not in kept | between | inside]


def _stays(node: gs.Node, extra: Collection[str], dialect: bool) -> bool:
    if node.op in extra or any(isinstance(value, gs.Graph) for value in node.attrs.values()):
        return True
    if node.domain == DOMAIN and node.op in OPS:
        return not dialect
    if node.domain == "com.microsoft":
        return node.op not in _FOREIGN
    return bool(node.domain and node.domain != "ai.onnx") or node.op in KEPT


def _overflows(node: gs.Node) -> bool:
    """Whether a constant of `node` is larger than float16 holds, and no mask."""
    for tensor in node.inputs:
        if isinstance(tensor, gs.Constant) and is_float(tensor):
            array = values(tensor)
            if array.size and bool(np.any((np.abs(array) > _LARGEST) & (np.abs(array) < MASK))):
                return True
    return False


def _between(graph: gs.Graph, nodes: list[gs.Node], kept: set[int]) -> set[int]:
    """Nodes all of whose floats come from nodes that stay (or from integers) and go to such.

    They stay too: a cast there and back would only round, as with the epsilon of a norm, or positions of a rotation.
    What has weights is worth a cast.
    """
    known = {id(node) for node in nodes}
    given = {id(t) for t in graph.inputs}
    outputs = {id(t) for t in graph.outputs}
    behind: set[int] = set()
    for node in nodes:
        floats = [t for t in reads(node) if is_float(t)]
        fits = all(id(t) not in given and t.inputs and id(t.inputs[0]) in behind | kept for t in floats)
        if fits and not any(isinstance(t, gs.Constant) and np.prod(t.shape) > _SMALL for t in node.inputs):
            behind.add(id(node))
    before: set[int] = set()
    for node in reversed(nodes):
        readers = [reader for t in node.outputs if is_float(t) for reader in t.outputs]
        ends = any(id(t) in outputs for t in node.outputs)
        if readers and not ends and all(id(r) in before | kept for r in readers if id(r) in known):
            before.add(id(node))
    return behind & before


def _captured(node: gs.Node) -> Iterator[gs.Tensor]:
    """Tensors of the outer graph that a branch or loop of `node` reads."""
    if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
        yield from reads(node)
