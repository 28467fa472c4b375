"""Replaces each op that a target lacks by standard ops, node by node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import onnx_graphsurgeon as gs

from trimtab.passes.canonicalize.heads import size_caches
from trimtab.passes.canonicalize.shapes import infer_shapes
from trimtab.passes.errors import ModelError
from trimtab.passes.graph import constant, replace_uses, topological, values
from trimtab.passes.graph.opset import raise_opset
from trimtab.passes.lower import counted
from trimtab.passes.lower.attention import Masks, group_query_attention, rotary_embedding
from trimtab.passes.lower.contrib import RULES
from trimtab.passes.lower.onnx_attention import attention, is_wide
from trimtab.passes.lower.topk import in_rounds, needs_rounds
from trimtab.plugins import DOMAIN
from trimtab.plugins.lowering import Nodes, Range, rules

_OPSET = 21  # from it on, DequantizeLinear supports blocks, and Gelu and ReduceMax have the forms that rules write
_MICROSOFT = "com.microsoft"
_ONNX_ATTENTION = "ai.onnx Attention"


def lower(graph: gs.Graph, *, tokens: Range | None = None) -> dict[str, int]:
    """Rewrite `graph` in place, so that TensorRT's parser supports it. Reads the weights of the ops that change.

    The rules of the dialect's ops are in their folders. Ops of the dialect without a rule stay, with their reference
    bodies, and so do nodes that are now plugins, which have other names.

    Args:
        tokens: the minimum and maximum number of tokens of a call, all rows together, if known.

    Returns:
        op → the number of rewritten nodes.

    Raises:
        ModelError: a use of an op cannot be lowered to standard ops; the message names the node.
    """
    to_lower = [node for node in graph.nodes if _rule(node)]
    lowered: Counter[str] = Counter()
    if not to_lower:
        return dict(lowered)
    raise_opset(graph, _OPSET)
    size_caches(graph)
    infer_shapes(graph)
    lowering = _Lowering(graph, tokens)
    for node in topological(graph):
        name = _rule(node)
        if name is None:
            continue
        outputs = lowering.of(name, node)
        for old, new in zip(list(node.outputs), outputs, strict=False):
            if new is not None:
                _take_over(graph, old, new)
        node.outputs.clear()
        lowered[node.op] += 1
    graph.cleanup(remove_unused_graph_inputs=False)
    graph.nodes = topological(graph)
    parts = (graph, *graph.subgraphs(recursive=True))
    left = {node.op for part in parts for node in part.nodes if node.domain == DOMAIN}
    graph.functions = [f for f in graph.functions if f.domain != DOMAIN or f.name in left]
    if not left:
        graph.import_domains = [d for d in graph.import_domains if d.domain != DOMAIN]
    return dict(lowered)


def _rule(node: gs.Node) -> str | None:
    """The name of the node's rule in `_Lowering`; None for a node that stays."""
    if node.domain == DOMAIN:
        return node.op if node.op in rules() else None
    if node.domain == _MICROSOFT and node.op in ("GroupQueryAttention", "RotaryEmbedding", *RULES):
        return node.op
    if is_wide(node):
        return _ONNX_ATTENTION
    if node.op == "SimplifiedLayerNormalization":  # ONNX Runtime's op, though in the standard domain
        return node.op
    if node.domain:
        return None
    return node.op if node.op in counted.RULES else "TopK" if needs_rounds(node) else None


class _Lowering:
    """The rules by op, and the tensors that the nodes of one graph share."""

    def __init__(self, graph: gs.Graph, tokens: Range | None) -> None:
        self.graph, self.tokens = graph, tokens
        self._masks: Masks | None = None
        self._rules: dict[str, Callable[[Nodes, gs.Node], list[gs.Tensor | None]]] = {
            **dict.fromkeys(rules(), _of_dialect),
            "GroupQueryAttention": self._attention,
            _ONNX_ATTENTION: attention,
            "RotaryEmbedding": lambda nodes, node: list(rotary_embedding(nodes, node)),
            "TopK": lambda nodes, node: list(in_rounds(nodes, node)),
            **RULES,
            **counted.RULES,
        }

    def of(self, name: str, node: gs.Node) -> list[gs.Tensor | None]:
        """The tensors that replace the outputs of `node`."""
        first = len(self.graph.nodes)
        results = self._rules[name](self._nodes(node.name or node.outputs[0].name), node)
        for later in self.graph.nodes[first:]:  # a rule may write a TopK with too large a k
            if name != "TopK" and needs_rounds(later):
                again = in_rounds(self._nodes(later.name), later)
                results = [_swapped(tensor, later.outputs, again) for tensor in results]
                for old, new in zip(list(later.outputs), again, strict=True):
                    _take_over(self.graph, old, new)
                later.outputs.clear()
        return results

    def _nodes(self, name: str) -> Nodes:
        return Nodes(self.graph, name, constant, values, self.tokens)

    def _attention(self, nodes: Nodes, node: gs.Node) -> list[gs.Tensor | None]:
        if self._masks is None:
            self._masks = Masks.of(self.graph)
        return list(group_query_attention(nodes, node, self._masks, self._width(node)))

    def _width(self, node: gs.Node) -> int:
        """The width of one head."""
        past = node.inputs[3].shape
        if past is not None and isinstance(past[-1], int) and past[-1] > 0:
            return int(past[-1])
        raise ModelError(f"{node.name}: the width of its heads is not known", hint="export the model again")


def _of_dialect(nodes: Nodes, node: gs.Node) -> list[gs.Tensor | None]:
    op, rule = rules()[node.op]
    try:
        return [*rule(nodes, node, {i.name: t for i, t in zip(op.inputs, node.inputs, strict=False) if t.name})]
    except ValueError as error:
        raise ModelError(f"{node.name}: {error}", hint="compile the model again") from error


def _swapped(tensor: gs.Tensor | None, old: list[gs.Tensor], new: list[gs.Tensor]) -> gs.Tensor | None:
    return next((b for a, b in zip(old, new, strict=True) if a is tensor), tensor)


def _take_over(graph: gs.Graph, old: gs.Tensor, new: gs.Tensor) -> None:
    """Replace `old` by `new`, also as an output of the graph."""
    if any(t is old for t in graph.outputs) and (not isinstance(new, gs.Variable) or not new.inputs):
        raise ModelError(f"{old.name!r}: lowering makes this output of the graph a constant or an input")
    replace_uses(graph, old, new)
    if new.shape is None:
        new.shape = old.shape
