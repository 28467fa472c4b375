"""SelectBlocks: scores of blocks of neurons → the numbers of the blocks to compute.

HiRE (arXiv 2402.09360): the approximate top-k over s devices (DA-TOP-k) is `shards`, where each narrows down to its own
best and one merge follows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import onnx_graphsurgeon as gs

from trimtab.plugins.dialect import ACTIVATION, Attribute, Form, Input, Op, Output, Value
from trimtab.plugins.rows import in_float, size_of
from trimtab.plugins.sizes import Shapes

__all__ = ["SELECT_BLOCKS", "local_k", "part_of_choice"]


def local_k(k: int, shards: int, blocks: int) -> int:
    """How many blocks each of the shards hands on."""
    return min(-(-k // shards), blocks // shards)


def part_of_choice(node: gs.Node, ranks: int) -> dict[str, int] | None:
    """The attributes with which each of so many ranks chooses among its own part of the blocks.

    None where `node` is no choice that shards make on their own, without a merge behind: that is one among all blocks.
    """
    k, shards = int(node.attrs.get("k", 1)), int(node.attrs.get("shards", 1))
    variable = node.attrs.get("at_most", 0)  # the best of all is not known to a rank
    if node.op != SELECT_BLOCKS.name or shards != ranks or k % shards or variable:
        return None
    return {"k": k // shards, "shards": 1}


def _infer(shapes: Shapes, attributes: Mapping[str, Value]) -> list[Any] | None:
    scores = shapes["scores"]
    if scores is None:
        return None
    tokens, k, most = math.prod(scores[:-1]), int(attributes["k"]), int(attributes["dense_above"])
    rows = 1 if attributes["shared"] else tokens
    if most < 0:
        return [rows, k]
    dense = tokens > most
    return [
        (rows - 1) * (1 - dense) + 1,
        dense * (scores[-1] - k) + k,
    ]  # no part is ever negative, for builders' bounds


def _body(form: Form) -> str:
    flat = "\n".join(in_float(form, "scores", "scores", "flat", "Reshape <allowzero = 1> ({}, flat_shape)"))
    return _STATEMENTS.replace("$size", size_of(form, "scores", "size")).replace("$flat", flat)


_STATEMENTS = """
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  two = Constant <value_ints = [2]> ()
  k_ = Constant <value_int: int = @k> ()
  shared_ = Constant <value_int: int = @shared> ()
  shards_ = Constant <value_int: int = @shards> ()
  dense_above_ = Constant <value_int: int = @dense_above> ()
  at_most_ = Constant <value_int: int = @at_most> ()
  n = Shape <start = -1> (scores)
$size
  tokens = Div (size, n)
  flat_shape = Concat <axis = 0> (tokens, n)
$flat
  some = Min (tokens, one)
  missing = Sub (one, some)
  filler_shape = Concat <axis = 0> (missing, n)
  filler = ConstantOfShape <value = float[1] {-1}> (filler_shape)
  filled = Concat <axis = 0> (flat, filler)
  many = Add (tokens, missing)
  s = Reshape (shards_, one)

  bounded = GreaterOrEqual (dense_above_, zero)
  above = Greater (tokens, dense_above_)
  dense = And (bounded, above)
  is_shared = Equal (shared_, one)
  together_ = Or (is_shared, dense)
  rows = Where (together_, one, many)
  together = Div (many, rows)
  grouped_shape = Concat <axis = 0> (rows, together, n)
  grouped = Reshape (filled, grouped_shape)
  most = ReduceMax <keepdims = 0> (grouped, one)

  take = Where (dense, n, k_)
  width = Div (n, s)
  k_s = Add (k_, s)
  k_s_1 = Sub (k_s, one)
  share = Div (k_s_1, s)
  fewer = Min (share, width)
  local = Where (dense, width, fewer)

  parts_shape = Concat <axis = 0> (rows, s, width)
  parts = Reshape (most, parts_shape)
  values, places = TopK <axis = -1> (parts, local)
  first = Constant <value_int = 0> ()
  step = Constant <value_int = 1> ()
  shard = Range (first, shards_, step)
  offset = Mul (shard, width)
  offset_ = Unsqueeze (offset, one)
  numbers = Add (places, offset_)
  handed_on = Mul (s, local)
  candidates_shape = Concat <axis = 0> (rows, handed_on)
  candidates = Reshape (numbers, candidates_shape)
  theirs = Reshape (values, candidates_shape)
  best, chosen = TopK <axis = -1> (theirs, take)
  found = GatherElements <axis = 1> (candidates, chosen)

  least = Constant <value_float = 0.0> ()
  reaches = GreaterOrEqual (best, least)
  take_ = Squeeze (take)
  place = Range (first, take_, step)
  is_best = Equal (place, first)
  reaches_ = Or (reaches, is_best)
  takes_all = Equal (at_most_, zero)
  takes_all_ = Or (takes_all, dense)
  taken = Or (reaches_, takes_all_)
  found_ = Where (taken, found, n)
  ascending, order = TopK <axis = -1, largest = 0> (found_, take)
  is_none = Equal (ascending, n)
  none = Constant <value_int = -1> ()
  numbers_ = Where (is_none, none, ascending)
  end = Where (together_, one, tokens)
  there = Slice (numbers_, zero, end, zero)
  blocks = Cast <to = 6> (there)
"""


SELECT_BLOCKS = Op(
    "SelectBlocks",
    doc="The k blocks of highest score of each token, in ascending order of their numbers; of equal ones the first. "
    "With at_most, those of them whose score is not below 0, and always the best; -1 in the places left over.",
    inputs=(Input("scores", ACTIVATION, "[..., blocks]"),),
    outputs=(Output("blocks", "tensor(int32)", "[tokens or 1, k], ascending; -1 at the end", _infer),),
    attributes=(
        Attribute("k", 1, "blocks to take"),
        Attribute("shared", 0, "1: one selection for all tokens, by each block's highest score; blocks is [1, k]"),
        Attribute("shards", 1, "neighbouring parts of the blocks, of which each narrows down on its own; divides them"),
        Attribute("dense_above", -1, "with more tokens all blocks are taken, and blocks is [1, all]; -1: never"),
        Attribute("at_most", 0, "1: of the k, those whose score is below 0 are left out, except the best of all"),
    ),
    body=_body,
)
