"""A dial of samples, brought to their tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.graph import constant, insert
from trimtab.passes.graph.order import topological
from trimtab.passes.graph.packed_batch import offsets_of
from trimtab.passes.graph.segments import segment_members
from trimtab.plugins import KEEP_TOKENS, PACKED_ATTENTION

_KEPT_OFFSETS = [output.name for output in KEEP_TOKENS.outputs].index("offsets_out")


class TokenDial:
    """A dial [batch] as scores of tokens need it, whatever form the tokens of a batch have.

    Args:
        dial: float32 [batch].
        name: begins the names of the nodes.
    """

    def __init__(self, graph: gs.Graph, dial: gs.Tensor, name: str) -> None:
        self._graph, self._dial, self._name = graph, dial, name
        self._order = {id(node): at for at, node in enumerate(topological(graph))}
        self._packed = [node for node in topological(graph) if node.op == PACKED_ATTENTION.name]
        self._made: dict[object, gs.Variable] = {}

    def taken_off(
        self, scores: gs.Tensor, x: gs.Tensor, at: str, level: Callable[[gs.Tensor], gs.Tensor] | None = None
    ) -> gs.Variable | str:
        """`scores` less the dial of the sample that each token belongs to; or why that cannot be told.

        Args:
            scores: [..., groups], in the leading sizes of `x`.
            x: a tensor of the graph, [batch, tokens, width], [T, width] packed, or [batch · tokens, width].
            level: of the dial at the tokens, [batch, 1, ...] or [T, 1], makes what is taken off instead, in its shape.
        """
        rank = None if x.shape is None else len(x.shape)
        if rank is None or rank < 2:
            return "the form of its input is not known, so neither is whose tokens are whose"
        if rank > 2:
            dial = self._of_rank(rank)
        elif self._packed:
            dial = self._of_packed(self._offsets(x))
        elif _flattened(x):
            scores = self._in_samples(scores, at)
            dial = self._of_rank(3)
        else:
            return "its tokens are in rows, and the graph does not tell which sample they belong to"
        taken = dial if level is None else level(dial)
        return insert(self._graph, "Sub", [scores, taken], f"{at}/above", dtype=np.float32)

    def _of_rank(self, rank: int) -> gs.Variable:
        """[batch, 1, ...]."""
        if rank not in self._made:
            axes = constant(f"{self._name}/axes.{rank}", np.arange(1, rank))
            name = f"{self._name}/of_samples.{rank}"
            self._made[rank] = insert(self._graph, "Unsqueeze", [self._dial, axes], name, dtype=np.float32)
        return self._made[rank]

    def _in_samples(self, scores: gs.Tensor, at: str) -> gs.Variable:
        """Of [batch · tokens, groups], [batch, tokens, groups]."""
        batch = self._node("Shape", [self._dial], f"{at}/batch", np.int64)
        shape = self._node("Shape", [scores], f"{at}/sizes", np.int64)
        rows = self._node("Slice", [shape, self._number("none", [0]), self._number("one", [1])], f"{at}/rows", np.int64)
        groups = self._node(
            "Slice", [shape, self._number("one", [1]), self._number("two", [2])], f"{at}/groups", np.int64
        )
        some = self._node("Max", [batch, self._number("one", [1])], f"{at}/some", np.int64)
        each = self._node("Div", [rows, some], f"{at}/each", np.int64)
        size = self._node("Concat", [batch, each, groups], f"{at}/in_samples", np.int64, axis=0)
        return self._node("Reshape", [scores, size], f"{at}/of_samples", np.float32, allowzero=1)

    def _of_packed(self, offsets: gs.Tensor) -> gs.Variable:
        """[T, 1]: the one of the sample whose rows, by `offsets`, each token is in. Exact: all other terms are 0."""
        if id(offsets) not in self._made:
            self._made[id(offsets)] = self._picked(offsets, f"{self._name}/of_tokens.{len(self._made)}")
        return self._made[id(offsets)]

    def _picked(self, offsets: gs.Tensor, name: str) -> gs.Variable:
        inside = segment_members(self._graph, offsets, name)
        members = self._node("Cast", [inside], f"{name}/members", np.float32, to=1)  # [batch, T]
        dial = self._node("Unsqueeze", [self._dial, self._number("none", [0])], f"{name}/dial", np.float32)
        each = self._node("MatMul", [dial, members], f"{name}/each", np.float32)
        return self._node("Transpose", [each], name, np.float32, perm=[1, 0])

    def _offsets(self, x: gs.Tensor) -> gs.Tensor:
        """Of the samples at `x`: those of the last op before it that has any."""
        found = [node for node in _before(x) if node.op in (PACKED_ATTENTION.name, KEEP_TOKENS.name)]
        if not found:
            return offsets_of(self._packed[0])
        node = max(found, key=lambda one: self._order.get(id(one), -1))
        return node.outputs[_KEPT_OFFSETS] if node.op == KEEP_TOKENS.name else offsets_of(node)

    def _number(self, key: str, value: list[int]) -> gs.Tensor:
        return constant(f"{self._name}/{key}", np.array(value, np.int64))

    def _node(self, op: str, inputs: list[gs.Tensor], name: str, dtype: object, **attrs: object) -> gs.Variable:
        return insert(self._graph, op, inputs, name, attrs=attrs, dtype=dtype)


def bars_token_dial(later: str) -> str | None:
    """Why the pass `later` cannot run behind one with such a dial, or None: as `Pass.bars` has it."""
    if later == "recover":
        return "training does not know the ops that it makes"
    if later in ("unpad", "token-prune"):
        return f"its dial follows the tokens of each sample, which {later} moves; put {later} in front"
    return None


def _before(x: gs.Tensor) -> list[gs.Node]:
    """The nodes that `x` depends on."""
    seen: dict[int, gs.Node] = {}
    waiting = list(x.inputs)
    while waiting:
        node = waiting.pop()
        if id(node) not in seen:
            seen[id(node)] = node
            waiting += [before for tensor in node.inputs for before in tensor.inputs]
    return list(seen.values())


def _flattened(x: gs.Tensor) -> bool:
    """Whether the rows of `x` are those of [batch, tokens, width], by the Reshape that made them so."""
    while x.inputs:
        node = x.inputs[0]
        if node.op == "Reshape":
            source = node.inputs[0].shape
            return source is not None and len(source) == 3 and source[-1] == x.shape[-1]
        if not node.inputs or node.inputs[0].shape is None or len(node.inputs[0].shape) != 2:
            return False
        x = node.inputs[0]
    return False
