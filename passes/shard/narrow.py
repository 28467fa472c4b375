"""Restricts a tensor's last axis to a rank's part, by following it back to the constants that determine its width."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.anatomy.activation import is_elementwise
from trimtab.passes.graph import constant, output_name_of, values
from trimtab.passes.shard.slices import Pieces, Slices, Whole
from trimtab.plugins import DOMAIN, OPS, SPARSE_HEAD
from trimtab.plugins.dialect import Op
from trimtab.plugins.select_blocks import part_of_choice


def op_of(node: gs.Node) -> Op | None:
    """The dialect's op of `node`; None for other ops."""
    return OPS.get(node.op) if node.domain == DOMAIN else None


def rows_of(node: gs.Node, op: Op) -> int:
    """The number of rows of a node's weights, which are divided among ranks."""
    return next(int(t.shape[0]) for i, t in zip(op.inputs, node.inputs, strict=False) if i.role == "rows")


class Narrow:
    """Creates nodes that compute parts, beside the nodes that compute the whole; a later clean-up removes unused ones.

    New nodes enter the graph only by `commit`. So the graph is unchanged if a path reaches an op that cannot be
    divided, or a size that is not divisible.

    Args:
        what: the name, in messages, of the units along the axis, such as "neurons".
    """

    def __init__(self, graph: gs.Graph, slices: Slices, what: str) -> None:
        self.graph, self.slices, self.share, self.what = graph, slices, slices.share, what
        self.new_nodes: list[gs.Node] = []
        self._parts: dict[int, gs.Tensor] = {}

    def commit(self) -> None:
        self.graph.nodes.extend(self.new_nodes)

    def undo(self) -> None:
        for node in self.new_nodes:
            node.inputs.clear()
            node.outputs.clear()

    def add(self, like: gs.Node, inputs: list[gs.Tensor], **attrs: object) -> gs.Variable:
        """Add a node like `like`, with other inputs; returns its output."""
        (whole,) = like.outputs
        shape = None if whole.shape is None else [*whole.shape[:-1], self._less(whole.shape[-1])]
        y = gs.Variable(self.slices.name(whole.name), whole.dtype, shape)
        name = self.slices.name(like.name or like.op)
        self.new_nodes.append(gs.Node(like.op, name, {**like.attrs, **attrs}, inputs, [y], like.domain))
        return y

    def _less(self, size: int | str | None) -> int | None:
        return size // self.share.shards if isinstance(size, int) and size % self.share.shards == 0 else None

    def __call__(self, tensor: gs.Tensor, size: int) -> gs.Tensor:
        """The part of `tensor`, [..., size].

        Raises:
            Whole: a node or constant before `tensor` cannot be divided.
        """
        self.share.of(size, self.what)
        if id(tensor) not in self._parts:
            self._parts[id(tensor)] = self._narrow(tensor, size)
        return self._parts[id(tensor)]

    def _narrow(self, tensor: gs.Tensor, size: int) -> gs.Tensor:
        if isinstance(tensor, gs.Constant):
            return self._constant(tensor, size)
        if tensor.shape and tensor.shape[-1] == 1 != size:
            return tensor  # a broadcast: the same for all ranks
        node = tensor.inputs[0] if len(tensor.inputs) == 1 else None
        if node is None:
            raise Whole(f"it depends on {tensor.name!r}, an input of the graph")
        if is_elementwise(node) or (node.op == "Cast" and not node.domain):
            return self.add(node, [self(t, size) if t.name else t for t in node.inputs])
        if node.op in ("MatMul", "Gemm") and not node.domain:
            return self._product(node, size)
        op = op_of(node)
        if op is not None and op.across_ranks == "concat":
            return self._sparse(node, op)
        if node.op == "Split" and self.pieces_of(node) is not None:
            return self._column_part(node, tensor, size)
        if node.op == "Concat" and self.pieces(tensor) is not None:
            return self.add(
                node, [self(t, n) for t, (_, n) in zip(node.inputs, self.pieces(tensor) or (), strict=True)]
            )
        if node.op == "ReduceSum":
            return self._pool(node, size)
        if node.op == "ScatterElements" and node.attrs.get("axis", 0) == -1 and "reduction" not in node.attrs:
            return self._scatter(node, size)
        raise Whole(f"{node.op} ({output_name_of(node)}) is an op that cannot be divided")

    def _constant(self, tensor: gs.Constant, size: int) -> gs.Constant:
        last = int(tensor.shape[-1]) if tensor.shape else 1
        if last == 1 != size:
            return tensor
        if last != size:
            raise Whole(f"constant {tensor.name!r} has {last} values for {size} {self.what}")
        return self.slices.constant(tensor, -1, self.what)

    def _product(self, node: gs.Node, size: int) -> gs.Tensor:
        """x W + b, by the columns of W."""
        x, weight, *bias = node.inputs
        attrs = node.attrs
        part = self.slices.weight(weight, 0 if attrs.get("transB", 0) else 1, self.what, self.new_nodes)
        return self.add(node, [x, part, *(self(b, size) if b.name else b for b in bias)])

    def pieces_of(self, node: gs.Node) -> Pieces | None:
        """Starts and sizes of the outputs of the Split `node` of ffn-split along the last axis; None if unknown."""
        sizes: list[int] | None = node.attrs.get("split")
        if len(node.inputs) > 1 and isinstance(node.inputs[1], gs.Constant):
            sizes = values(node.inputs[1]).tolist()
        if sizes is None or node.attrs.get("axis", 0) != -1:
            return None
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        return tuple(zip(starts, sizes, strict=True))

    def pieces(self, tensor: gs.Tensor) -> Pieces | None:
        """The pieces of a Concat of activated neurons and a part that a Split leads past the activation; else None."""
        node = tensor.inputs[0] if len(tensor.inputs) == 1 else None
        if node is None or node.op != "Concat" or node.attrs.get("axis", 0) != -1:
            return None
        splits = [t.inputs[0] for t in node.inputs if t.inputs and t.inputs[0].op == "Split"]
        return self.pieces_of(splits[0]) if splits else None

    def _column_part(self, node: gs.Node, tensor: gs.Tensor, size: int) -> gs.Tensor:
        """One output of a Split of a product, by its own columns of W."""
        product = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
        place = next(i for i, t in enumerate(node.outputs) if t is tensor)
        start, width = (self.pieces_of(node) or ())[place]
        if product is None or product.op != "MatMul" or width != size:
            raise Whole(f"Split ({output_name_of(node)}) is not of a product")
        x, weight = product.inputs
        part = self.slices.weight(weight, 1, self.what, self.new_nodes, ((start, size),))
        return self.add(product, [x, part])

    def choose(self, blocks: gs.Tensor, count: int) -> gs.Tensor:
        """A rank's part of a choice among `count` blocks, numbered from the rank's first block on.

        Raises:
            Whole: the choice is made among all blocks, not by each shard on its own.
        """
        each = self.share.of(count, self.what)
        if id(blocks) in self._parts:
            return self._parts[id(blocks)]
        if isinstance(blocks, gs.Constant):
            if not np.array_equal(values(blocks).reshape(-1), np.arange(count)):
                raise Whole(f"its choice of {self.what} is fixed")
            choice: gs.Tensor = constant(
                self.slices.name(blocks.name), np.arange(each.stop - each.start, dtype=np.int32)[None]
            )
        else:
            node = blocks.inputs[0]
            attributes = part_of_choice(node, self.share.shards)
            if attributes is None:
                raise Whole(f"its {self.what} are chosen among all, not by each of {self.share.shards} shards")
            choice = self.add(node, [self(node.inputs[0], count)], **attributes)
        self._parts[id(blocks)] = choice
        return choice

    def rows(self, node: gs.Node, op: Op) -> list[gs.Tensor]:
        """The inputs of `node`, with the rank's rows of its weights; the caller replaces the data input."""
        count = rows_of(node, op) // int(node.attrs.get("block", 1))
        parts: list[gs.Tensor] = []
        for i, tensor in zip(op.inputs, node.inputs, strict=False):
            if i.role == "choice":
                parts.append(self.choose(tensor, count))
            elif i.role == "data" or not tensor.name:
                parts.append(tensor)
            else:
                if not isinstance(tensor, gs.Constant):
                    raise Whole(f"{i.name} of {output_name_of(node)} is not a constant")
                parts.append(self.slices.constant(tensor, 0, self.what))
        return parts

    def _sparse(self, node: gs.Node, op: Op) -> gs.Tensor:
        return self.add(node, self.rows(node, op))

    def _pool(self, node: gs.Node, size: int) -> gs.Tensor:
        """Sums over blocks of neighbours: ReduceSum of a Reshape to [-1, size, block]."""
        before = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
        target = values(before.inputs[1]) if before is not None and before.op == "Reshape" else None
        axes = values(node.inputs[1]).tolist() if isinstance(node.inputs[1], gs.Constant) else None
        blocks = target is not None and target.shape == (3,) and target[1] == size
        if not blocks or axes not in ([-1], [2]) or node.attrs.get("keepdims", 1):
            raise Whole(f"ReduceSum ({output_name_of(node)}) is not over blocks of neighbours")
        assert before is not None and target is not None
        each = self.share.of(size, self.what)
        scores = self(before.inputs[0], size * int(target[2]))
        shape = constant(self.slices.name(before.inputs[1].name), np.array([-1, each.stop - each.start, target[2]]))
        parts = self.add(before, [scores, shape])
        parts.shape = None
        return self.add(node, [parts, node.inputs[1]])

    def _scatter(self, node: gs.Node, size: int) -> gs.Tensor:
        """The rank's part of the logits of head-topk: exact ones of chosen rows among cheap ones."""
        cheap, places, exact = node.inputs
        chosen = exact.inputs[0] if exact.inputs else None
        if chosen is None or chosen.op != SPARSE_HEAD.name:
            raise Whole(f"ScatterElements ({output_name_of(node)}) is not of chosen rows")
        blocks = chosen.inputs[[i.name for i in SPARSE_HEAD.inputs].index("blocks")]
        part = self._sparse(chosen, SPARSE_HEAD)
        parts: dict[int, gs.Tensor] = {id(exact): part, id(blocks): self.choose(blocks, size)}
        return self.add(node, [self(cheap, size), self._again(places, parts), part])

    def _again(self, tensor: gs.Tensor, parts: dict[int, gs.Tensor]) -> gs.Tensor:
        """The rank's part of `tensor`, computed by copies of its nodes from `parts` (tensor id → the rank's part)."""
        if isinstance(tensor, gs.Constant):
            return tensor
        if id(tensor) not in parts:
            if len(tensor.inputs) != 1:
                raise Whole(f"it depends on {tensor.name!r}, an input of the graph")
            node = tensor.inputs[0]
            copy = self.add(node, [self._again(t, parts) for t in node.inputs])
            copy.shape = None
            parts[id(tensor)] = copy
        return parts[id(tensor)]
