"""Decides which nodes compute in half precision, and which stay in float32, with the reason."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.graph import topological, values
from trimtab.passes.graph.cut import reads
from trimtab.passes.precision.masks import MASK, biased_softmaxes, mask_tensors
from trimtab.passes.precision.origins import counted_nodes
from trimtab.passes.precision.tensors import (
    MOVES,
    QUANTIZERS,
    has_subgraphs,
    has_weights,
    is_float,
    is_integer,
    is_sequence,
)
from trimtab.plugins import DOMAIN, OPS

STATISTICS = frozenset([
    "CumSum", "DynamicQuantizeLinear", "Exp", "GridSample", "Log", "Pow", "Range", "Reciprocal", "ReduceL1",
    "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceSum", "ReduceSumSquare", "Resize", "Sin", "Cos",
    "Sqrt", "RoiAlign",
])  # fmt: skip
"""Sums over many values, powers and roots (the statistics of written-out norms), angles and coordinates.
onnxconverter-common and TensorRT's guides keep these in float32, too. LayerNormalization, RMSNormalization and Softmax
sum in float32 inside."""

DECISIONS = frozenset([
    "ArgMax", "ArgMin", "Bernoulli", "Ceil", "Equal", "Floor", "Greater", "GreaterOrEqual", "Hardmax", "Less",
    "LessOrEqual", "Mod", "Multinomial", "NonMaxSuppression", "NonZero", "OneHot", "Round", "Sign", "TopK", "Unique",
])  # fmt: skip
"""Ops that turn floats into discrete values, like a Cast to integers: rounding before them changes the outcome."""

_FOREIGN = frozenset([
    "Attention", "BiasGelu", "FastGelu", "FusedMatMul", "Gelu", "GroupQueryAttention", "MatMulNBits",
    "MultiHeadAttention", "QuickGelu", "RotaryEmbedding", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
])  # fmt: skip
"""Ops of com.microsoft that support half precision."""

_PRODUCTS = frozenset([
    "Attention", "Conv", "ConvTranspose", "Einsum", "FusedMatMul", "Gemm", "GroupQueryAttention", "MatMul",
    "MatMulNBits", "MultiHeadAttention",
])  # fmt: skip
"""Ops that profit most from half precision. The need for float32 does not extend across them."""

_ARITHMETIC = MOVES | {"Abs", "Add", "Clip", "Max", "Min", "Neg", "Sub", "Where"}
_INTEGER_PRODUCTS = ("ConvInteger", "MatMulInteger")


@dataclass(frozen=True)
class Regions:
    """The division of a graph into half precision and float32.

    Attributes:
        half: the nodes that compute in half precision.
        kept: id of each node that stays in float32 → the reason.
        masks: ids of the tensors from which additive masks are computed.
        deciding: the nodes that compute discrete values from values rounded to half precision.
    """

    half: list[gs.Node]
    kept: dict[int, str]
    masks: set[int]
    deciding: list[gs.Node]


def divide(graph: gs.Graph, dtype: np.dtype, extra: Collection[str] = (), *, dialect: bool = False) -> Regions:
    """Divide the nodes of `graph` that compute in float32. The types of its tensors must be known (`infer_shapes`).

    Args:
        dtype: the half type.
        extra: further ops that stay in float32.
        dialect: trimtab's ops may compute in half precision.
    """
    nodes = [node for node in topological(graph) if any(map(is_float, (*node.inputs, *node.outputs)))]
    masks = mask_tensors(nodes)
    kept: dict[int, str] = {}
    for node in nodes:
        reason = _reason(node, extra, dialect) or _range(node, dtype, masks)
        if reason is not None:
            kept[id(node)] = reason
    for node in nodes:  # sums of integer products need the range of float32 until they are scaled
        if node.op == "Cast" and node.inputs[0].inputs and node.inputs[0].inputs[0].op in _INTEGER_PRODUCTS:
            scaling = (reader for reader in node.outputs[0].outputs if reader.op == "Mul")
            kept |= dict.fromkeys((id(node), *map(id, scaling)), "integer products")
    counted = counted_nodes(graph)
    kept |= {id(node): "computed of integers" for node in nodes if id(node) in counted}
    biased = biased_softmaxes(nodes, masks, counted, dtype)
    kept |= {id(node): "positions in scores" for node in nodes if id(node) in biased}
    captured = {id(t) for node in nodes for t in _captured(node)}
    kept |= {id(n): "read by a branch or loop" for n in nodes if any(id(t) in captured for t in n.outputs)}
    _bridge(graph, nodes, kept)
    _follow(nodes, kept, counted)
    _lead(graph, nodes, kept)
    half = [node for node in nodes if id(node) not in kept]
    return Regions(half, kept, masks, _deciding(nodes, kept))


def decides(node: gs.Node) -> bool:
    """Whether `node` turns floats into discrete values."""
    if node.domain not in (None, "", "ai.onnx"):
        return False
    to_integers = node.op in ("Cast", "CastLike") and is_float(node.inputs[0]) and is_integer(node.outputs[0])
    return to_integers or (node.op in DECISIONS and any(map(is_float, node.inputs)))


def _reason(node: gs.Node, extra: Collection[str], dialect: bool) -> str | None:
    """Why `node` stays in float32, judged by itself; None if it need not."""
    if node.op in extra:
        return "asked for"
    if has_subgraphs(node):
        return "branch or loop"
    if any(map(is_sequence, (*node.inputs, *node.outputs))):
        return "sequence"
    if node.domain == DOMAIN and node.op in OPS:
        return None if dialect and "tensor(float16)" in OPS[node.op].inputs[0].types else "kernels"
    if node.domain == "com.microsoft":
        return None if node.op in _FOREIGN else "kernels"
    if node.domain and node.domain != "ai.onnx":
        return "kernels"
    if decides(node):
        return "decision"
    squares = node.op == "Mul" and node.inputs[0] is node.inputs[1]
    return "statistics" if squares or node.op in STATISTICS else None


def _range(node: gs.Node, dtype: np.dtype, masks: set[int]) -> str | None:
    """ "range" if a constant of `node` is outside the range of `dtype`: too large and no mask, or all too small."""
    limits = ml_dtypes.finfo(dtype)
    masking = any(id(tensor) in masks for tensor in node.outputs)
    for tensor in node.inputs:
        if not isinstance(tensor, gs.Constant) or not is_float(tensor) or not np.prod(tensor.shape):
            continue
        if has_weights(node) and float(limits.max) >= MASK:
            continue  # no weight is out of range, so none is read
        sizes = np.abs(values(tensor))
        if not masking and bool(np.any((sizes > float(limits.max)) & (sizes < MASK))):
            return "range"
        small = 0 < sizes.max() < float(limits.smallest_normal)
        if small and not has_weights(node) and node.op not in QUANTIZERS:
            return "range"  # an epsilon, which keeps a quotient finite
    return None


def _bridge(graph: gs.Graph, nodes: list[gs.Node], kept: dict[int, str]) -> None:
    """Keep the nodes between kept nodes, such as attention between integer products, except layers with weights."""
    node_ids = {id(node) for node in nodes}
    graph_inputs = {id(t) for t in graph.inputs}
    outputs = {id(t) for t in graph.outputs}
    behind = set(kept)
    for node in nodes:
        floats = [t for t in reads(node) if is_float(t)]
        fits = all(id(t) not in graph_inputs and t.inputs and id(t.inputs[0]) in behind for t in floats)
        if fits and not has_weights(node):
            behind.add(id(node))
    before = set(kept)
    for node in reversed(nodes):
        readers = [reader for t in node.outputs if is_float(t) for reader in t.outputs]
        ends = any(id(t) in outputs for t in node.outputs)
        if readers and not ends and all(id(r) in before for r in readers if id(r) in node_ids):
            before.add(id(node))
    kept |= dict.fromkeys((behind & before) - set(kept), "between")


def _follow(nodes: list[gs.Node], kept: dict[int, str], counted: set[int]) -> None:
    """Keep the nodes that use statistics, up to activations in half precision: the rest of a norm, a mean, a softmax.

    A sum may exceed the range of float16 though its mean does not, and a variance may be too small though its root is
    not. So the quotient is computed first, and then cast.
    """
    reasons = ("statistics", "range", "integer products")
    asked = {id(node) for node in nodes if kept.get(id(node)) == "asked for" and node.op in STATISTICS}
    wide = asked | {id(node) for node in nodes if kept.get(id(node)) in reasons}
    wide -= counted
    moved: list[gs.Node] = []
    for node in nodes:
        if id(node) in kept or has_weights(node):
            continue
        floats = [t for t in node.inputs if is_float(t) and not isinstance(t, gs.Constant)]
        makers = [id(t.inputs[0]) if t.inputs else 0 for t in floats]
        if not any(maker in wide for maker in makers):
            continue
        only_wide = all(maker in wide | counted for maker in makers)
        if node.op in ("Div", "Mul") or (only_wide and node.op in _ARITHMETIC):
            wide.add(id(node))
            kept[id(node)] = "statistics"
            if node.op in MOVES:
                moved.append(node)
    for node in reversed(moved):  # moves whose readers are all in half precision need not be wide
        if not any(id(reader) in kept for reader in node.outputs[0].outputs):
            del kept[id(node)]


def _lead(graph: gs.Graph, nodes: list[gs.Node], kept: dict[int, str]) -> None:
    """Keep the nodes that only kept nodes read, back to the last product or layer with weights.

    Half precision would only round their values before their use: the inputs of a decision, an epsilon, a square.
    """
    outputs = {id(t) for t in graph.outputs}
    node_ids = {id(node) for node in nodes}
    for node in reversed(nodes):
        if id(node) in kept or node.op in _PRODUCTS or has_weights(node) or node.domain == DOMAIN:
            continue
        results = [t for t in node.outputs if is_float(t)]
        readers = [r for t in results for r in t.outputs if id(r) in node_ids and r.op not in ("Shape", "Size")]
        if readers and not any(id(t) in outputs for t in results) and all(id(r) in kept for r in readers):
            kept[id(node)] = kept[id(readers[0])]


def _deciding(nodes: list[gs.Node], kept: dict[int, str]) -> list[gs.Node]:
    """Nodes that compute discrete values from outputs of half-precision nodes, perhaps through kept nodes."""
    node_ids = {id(node) for node in nodes}
    rounded: set[int] = set()  # nodes whose values depend on half precision
    for node in nodes:
        makers = [t.inputs[0] for t in node.inputs if is_float(t) and t.inputs]
        if id(node) not in kept or any(id(maker) in rounded for maker in makers if id(maker) in node_ids):
            rounded.add(id(node))
    return [node for node in nodes if id(node) in rounded and decides(node)]


def _captured(node: gs.Node) -> Iterator[gs.Tensor]:
    """Tensors of the outer graph that a branch or loop of `node` reads."""
    if has_subgraphs(node):
        yield from reads(node)
