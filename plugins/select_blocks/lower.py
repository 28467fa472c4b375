"""SelectBlocks in standard ops whose sizes TensorRT's parser can tell: its k never comes of data."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.plugins import DOMAIN, OPS
from trimtab.plugins.lowering import Nodes, type_of
from trimtab.plugins.select_blocks import SELECT_BLOCKS, local_k


def _select_blocks(nodes: Nodes, node: gs.Node, inputs: Mapping[str, gs.Tensor]) -> list[gs.Tensor]:
    """Its blocks, [tokens or 1, k], int32; in the order of the scores where nobody sees the order.

    Of the two forms that `dense_above` asks for, one is left out where the tokens of a call decide between them.
    """
    return [_chosen(nodes, node, inputs["scores"], _blocks(node))]


def _blocks(node: gs.Node) -> int:
    """How many blocks it chooses from: as many as those who read its choice have rows."""
    for reader in node.outputs[0].outputs:
        op = OPS.get(reader.op) if reader.domain == DOMAIN else None
        if op is None:
            continue
        weight = next((t for i, t in zip(op.inputs, reader.inputs, strict=False) if i.role == "rows"), None)
        if weight is not None and weight.shape is not None:
            return int(weight.shape[0]) // int(reader.attrs.get("block", 1))
    shape = node.inputs[0].shape
    if shape is not None and isinstance(shape[-1], int):
        return int(shape[-1])
    raise ValueError("how many blocks it chooses from is not in the graph")


def _chosen(nodes: Nodes, node: gs.Node, scores: gs.Tensor, blocks: int) -> gs.Tensor:
    """Numbers of the chosen ones of so many blocks."""
    k, shared, shards, above, at_most = (
        int(node.attrs[key]) for key in ("k", "shared", "shards", "dense_above", "at_most")
    )
    if k > blocks or blocks % shards:
        raise ValueError(f"chooses {k} of {blocks} blocks in {shards} shards")
    every = np.arange(blocks, dtype=np.int32)[None]
    low, high = nodes.tokens or (1, None)
    if (k == blocks and not at_most) or 0 <= above < low:
        return nodes.tensor(every)
    flat = nodes("Reshape", scores, [-1, blocks])
    rows = nodes("ReduceMax", flat, [0], keepdims=1) if shared else flat
    best, chosen = _best(nodes, rows, k, blocks, shards, local_k(k, shards, blocks))
    if at_most:
        chosen = _left_out(nodes, best, chosen, k, blocks)
    if any(output is node.outputs[0] for output in nodes.graph.outputs):
        chosen = _ascending(nodes, chosen, k)
    if at_most:
        none = nodes("Equal", chosen, np.array(blocks, type_of(chosen)), dtype=bool)
        chosen = nodes("Where", none, np.array(-1, type_of(chosen)), chosen, dtype=type_of(chosen))
    chosen = nodes.cast(chosen, np.dtype(np.int32))
    if above < 0 or (high is not None and high <= above):
        return chosen
    return _or_all(nodes, chosen, nodes.size(flat, 0), every, k, above, bool(shared))


def _left_out(nodes: Nodes, best: gs.Tensor, chosen: gs.Tensor, k: int, blocks: int) -> gs.Variable:
    """`chosen`, with the number `blocks` where the score `best` is below 0, but for the first, which is the best."""
    is_best = np.arange(k) == 0
    taken = nodes("Or", nodes("GreaterOrEqual", best, np.array(0, type_of(best)), dtype=bool), is_best, dtype=bool)
    return nodes("Where", taken, chosen, np.array(blocks, np.int64), dtype=np.int64)


def _best(
    nodes: Nodes, scores: gs.Tensor, k: int, blocks: int, shards: int, local: int
) -> tuple[gs.Variable, gs.Variable]:
    """The k largest of each row of `scores`, of which each shard hands on `local`, and their places."""
    if shards == 1:
        return nodes.topk(scores, k)
    width = blocks // shards
    values, places = nodes.topk(nodes("Reshape", scores, [-1, shards, width]), local)
    offset = (width * np.arange(shards, dtype=np.int64))[:, None]
    numbers = nodes("Reshape", nodes("Add", places, offset), [-1, shards * local])
    handed_on = nodes("Reshape", values, [-1, shards * local])
    if shards * local == k:
        return handed_on, numbers
    best, taken = nodes.topk(handed_on, k)
    return best, nodes("GatherElements", numbers, taken, axis=1)


def _ascending(nodes: Nodes, numbers: gs.Tensor, k: int) -> gs.Variable:
    """In floats, which TopK takes everywhere; numbers of blocks are exact in them."""
    negative = nodes("Neg", nodes.cast(numbers, np.dtype(np.float32)))
    return nodes("Neg", nodes.topk(negative, k)[0])


def _or_all(
    nodes: Nodes, chosen: gs.Tensor, tokens: gs.Tensor, every: np.ndarray, k: int, above: int, shared: bool
) -> gs.Variable:
    """`chosen`, or all blocks in one row in a call of more than `above` tokens.

    Both sizes of the answer are sums and products of the number of tokens, and a slice of one tensor gives either.
    """
    blocks = every.shape[1]
    dense = nodes("Min", nodes("Max", nodes("Sub", tokens, [above]), [0]), [1])
    one = nodes.tensor([1])
    rows = one if shared else nodes("Add", tokens, nodes("Mul", dense, nodes("Sub", one, tokens)))
    take = nodes("Add", nodes("Mul", dense, [blocks - k]), [k])
    there = one if shared else tokens
    rest = nodes("Expand", every[:, k:], nodes("Concat", there, [blocks - k], axis=0))
    wide = nodes("Concat", chosen, rest, axis=1)
    is_dense = nodes.cast(dense, np.dtype(bool))
    either = nodes("Where", is_dense, every, wide, dtype=np.int32)
    return nodes("Slice", either, [0, 0], nodes("Concat", rows, take, axis=0), [0, 1])


RULES = {SELECT_BLOCKS: _select_blocks}
