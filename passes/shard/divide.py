"""Divides a compiled graph into the graphs of s ranks: FFNs by their neurons, the head by its vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import onnx_graphsurgeon as gs

from trimtab.passes.anatomy import Anatomy, find_anatomy
from trimtab.passes.contract import Left, PassResult
from trimtab.passes.graph import insert, replace_uses, stored_bytes, topological
from trimtab.passes.graph.linear import Linear
from trimtab.passes.shard.narrow import Narrow, op_of, rows_of
from trimtab.passes.shard.slices import Share, Slices, Whole
from trimtab.plugins import DOMAIN, SPARSE_HEAD
from trimtab.plugins.dialect import Op

NAME = "shard"

How = Literal["sum", "concat"]


@dataclass(frozen=True)
class Join:
    """A point where the ranks exchange their results.

    Attributes:
        tensor: each rank computes its own values of it.
        how: how the values are joined for all ranks: by their sum, or side by side along the last axis.
    """

    tensor: gs.Tensor
    how: How


@dataclass(frozen=True)
class Rank:
    """The graph of one rank.

    Attributes:
        joins: in the order of computation, at the same tensors in all ranks.
        result: the divided and the undivided parts, for the report; the same for all ranks.
    """

    graph: gs.Graph
    joins: tuple[Join, ...]
    result: PassResult


@dataclass(frozen=True)
class _Site:
    """A part of the graph that may be divided.

    Attributes:
        node: the product, or the op, whose output the ranks join.
        what: the name, in messages, of the divided units, such as "neurons".
        linear: the projection of a dense head.
    """

    where: str
    node: gs.Node
    how: How
    what: str
    linear: Linear | None = None


def divide(graph: gs.Graph, rank: int, shards: int) -> Rank:
    """The graph of `rank` of `shards`. `graph` does not change; it shares undivided weights with the result.

    Each FFN computes the rank's neurons and their part of the output; its output bias is added once, after the join.
    The head computes the rank's logits. Every rank computes attention and all other parts itself. Together the ranks
    compute the same products as the one graph; only sums have another order.
    """
    own = graph.copy()
    own.nodes = topological(own)
    slices = Slices(Share(rank, shards))
    joins: list[Join] = []
    left: list[Left] = []
    rows: list[dict[str, object]] = []
    anatomy = find_anatomy(own)
    unknown = [Left(f"FFN at node {u.where}", u.why) for u in anatomy.unrecognized if u.what == "FFN"]
    for site in list(_sites(own, anatomy)):
        narrow = Narrow(own, slices, site.what)
        try:
            tensor, size = _divide(narrow, site)
        except Whole as why:
            narrow.undo()
            left.append(Left(site.where, str(why)))
            continue
        joins.append(Join(tensor, site.how))
        rows.append({"place": site.where, "divided": site.what, "all": size, "of each rank": size // shards})
    own.cleanup(remove_unused_graph_inputs=False)
    own.nodes = topological(own)
    weights = {id(t): stored_bytes(t) for t in own.tensors().values() if isinstance(t, gs.Constant)}
    details = {"shards": shards, "rank_bytes": sum(weights.values()), "places": rows}
    return Rank(own, tuple(joins), PassResult(NAME, len(joins), (*left, *unknown, *_integer(own)), details))


def _sites(graph: gs.Graph, anatomy: Anatomy) -> Iterator[_Site]:
    """FFNs in the order of computation, sparse and dense, then the head."""
    downs = {id(_product(ffn.down)) for ffn in anatomy.ffns}
    layers = {node: block.layer for block in anatomy.blocks for node in block.nodes}
    ffns = (node for node in graph.nodes if id(node) in downs or _sums(node) or _around(node))
    for number, node in enumerate(ffns):
        yield _Site(f"layer {layers.get(id(node), number)} FFN", node, "sum", "neurons")
    heads = [node for node in graph.nodes if _is(node, SPARSE_HEAD.name)]
    for node in heads:
        scatters = [after for after in node.outputs[0].outputs if after.op == "ScatterElements"]
        yield _Site("head", scatters[0] if scatters else node, "concat", "vocabulary rows")
    linear = anatomy.head.vocabulary if anatomy.head is not None and not heads else None
    if linear is not None:
        yield _Site("head", linear.nodes[-1], "concat", "vocabulary rows", linear)


def _divide(narrow: Narrow, site: _Site) -> tuple[gs.Tensor, int]:
    """Replace `site` by the rank's part; returns its output, and the number of divided units (neurons or rows)."""
    node, graph = site.node, narrow.graph
    whole = node.outputs[0]
    if site.how == "concat":
        size = _vocabulary(node, site.linear)
        tensor = narrow(whole, size)
        narrow.commit()
        shape = whole.shape
        replace_uses(graph, whole, tensor)
        tensor.shape = None if shape is None else [*shape[:-1], None]  # partial before the join, whole after it
        return tensor, size
    bias: gs.Tensor | None = None
    op = op_of(node)
    if op is not None:
        size, tensor = _sparse_down(narrow, node, op)
    else:
        size, tensor, bias = _dense_down(narrow, node)
    narrow.commit()
    tensor.shape = whole.shape
    after = tensor
    if bias is not None:
        after = insert(graph, "Add", [tensor, bias], f"{tensor.name}/bias", dtype=tensor.dtype)
    replace_uses(graph, whole, after)
    return tensor, size


def _sparse_down(narrow: Narrow, node: gs.Node, op: Op) -> tuple[int, gs.Variable]:
    size = rows_of(node, op)
    block = int(node.attrs.get("block", 1))
    narrow.share.of(size, "neurons")
    narrow.share.of(size // block, f"blocks of {block} neurons")
    h, *others = narrow.rows(node, op)
    if not h.inputs:
        raise Whole(f"it depends on {h.name!r}, an input of the graph")
    return size, narrow.add(node, [narrow(h, size), *others])


def _dense_down(narrow: Narrow, node: gs.Node) -> tuple[int, gs.Variable, gs.Tensor | None]:
    """The product with the rank's rows of W, and the bias, which must be added after the join."""
    if node.op not in ("MatMul", "Gemm"):
        raise Whole(f"its down projection is {node.op}, which is not divided")
    x, weight, *bias = node.inputs
    axis = 1 if node.attrs.get("transB", 0) else 0
    stored = weight
    size = None
    while stored is not None and size is None:
        if isinstance(stored, gs.Constant):
            size = int(stored.shape[axis])
        else:
            source = stored.inputs[0]
            axis = 1 - axis if source.op == "Transpose" else axis
            stored = source.inputs[0]
    assert size is not None
    part = narrow(x, size)
    along = 1 if node.attrs.get("transB", 0) else 0
    rows = narrow.slices.weight(weight, along, narrow.what, narrow.new_nodes, narrow.pieces(x))
    own_bias = bias[0] if bias and bias[0].name else None
    if own_bias is not None and node.attrs.get("beta", 1.0) != 1.0:
        raise Whole("its bias is scaled")
    return size, narrow.add(node, [part, rows]), own_bias


def _vocabulary(node: gs.Node, linear: Linear | None) -> int:
    if linear is not None:
        return linear.out_features
    exact = node if _is(node, SPARSE_HEAD.name) else node.inputs[2].inputs[0]
    return rows_of(exact, SPARSE_HEAD)


def _product(linear: Linear) -> gs.Node:
    return next(node for node in linear.nodes if node.op in ("MatMul", "Gemm", "MatMulNBits", "Int4Linear"))


def _around(node: gs.Node) -> bool:
    """Whether a product reads the output of ffn-split: neurons beside a linear part that bypasses the activation."""
    before = node.inputs[0].inputs if node.op == "MatMul" else []
    splits = before[0].inputs if before and before[0].op == "Concat" else []
    return any(tensor.inputs and tensor.inputs[0].op == "Split" for tensor in splits)


def _sums(node: gs.Node) -> bool:
    op = op_of(node)
    return op is not None and op.across_ranks == "sum"


def _is(node: gs.Node, op: str) -> bool:
    return node.domain == DOMAIN and node.op == op


def _integer(graph: gs.Graph) -> list[Left]:
    """A note on integer products, whose activations dynamic quantization has rounded."""
    count = sum(
        node.op in ("Int8Linear", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")
        for node in graph.nodes
    )
    why = "their activations are rounded by the range of a whole tensor or row, of which a rank has only a part"
    return [Left(f"{count} products of integers", why)] if count else []
