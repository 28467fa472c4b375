"""Expands a dial with one value per sample to the samples' tokens."""

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
    """A dial [batch], expanded to the shape of the tokens' scores, for all layouts of the tokens of a batch.

    Args:
        dial: float32 [batch].
        name: prefix of the nodes' names.
    """

    def __init__(self, graph: gs.Graph, dial: gs.Tensor, name: str) -> None:
        self._graph, self._dial, self._name = graph, dial, name
        self._order = {id(node): at for at, node in enumerate(topological(graph))}
        self._packed = [node for node in topological(graph) if node.op == PACKED_ATTENTION.name]
        self._expanded: dict[object, gs.Variable] = {}

    def taken_off(
        self, scores: gs.Tensor, x: gs.Tensor, at: str, level: Callable[[gs.Tensor], gs.Tensor] | None = None
    ) -> gs.Variable | str:
        """`scores` minus the dial of each token's sample; or the reason why the samples are unknown.

        Args:
            scores: [..., groups], with the leading sizes of `x`.
            x: a tensor of the graph, [batch, tokens, width], [T, width] packed, or [batch · tokens, width].
            level: maps the expanded dial, [batch, 1, ...] or [T, 1], to the value to subtract, of the same shape.
        """
        rank = None if x.shape is None else len(x.shape)
        if rank is None or rank < 2:
            return "the shape of its input is unknown, so the samples of its tokens are unknown too"
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
        """The dial as [batch, 1, ...]."""
        if rank not in self._expanded:
            axes = constant(f"{self._name}/axes.{rank}", np.arange(1, rank))
            name = f"{self._name}/of_samples.{rank}"
            self._expanded[rank] = insert(self._graph, "Unsqueeze", [self._dial, axes], name, dtype=np.float32)
        return self._expanded[rank]

    def _in_samples(self, scores: gs.Tensor, at: str) -> gs.Variable:
        """Reshape scores [batch · tokens, groups] to [batch, tokens, groups]."""
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
        """The dial of each packed token's sample, [T, 1], selected by `offsets`. Exact, since all other terms are 0."""
        if id(offsets) not in self._expanded:
            self._expanded[id(offsets)] = self._picked(offsets, f"{self._name}/of_tokens.{len(self._expanded)}")
        return self._expanded[id(offsets)]

    def _picked(self, offsets: gs.Tensor, name: str) -> gs.Variable:
        inside = segment_members(self._graph, offsets, name)
        members = self._node("Cast", [inside], f"{name}/members", np.float32, to=1)  # [batch, T]
        dial = self._node("Unsqueeze", [self._dial, self._number("none", [0])], f"{name}/dial", np.float32)
        each = self._node("MatMul", [dial, members], f"{name}/each", np.float32)
        return self._node("Transpose", [each], name, np.float32, perm=[1, 0])

    def _offsets(self, x: gs.Tensor) -> gs.Tensor:
        """The offsets of the samples at `x`, from the last op before `x` that has offsets."""
        sources = [node for node in _before(x) if node.op in (PACKED_ATTENTION.name, KEEP_TOKENS.name)]
        if not sources:
            return offsets_of(self._packed[0])
        node = max(sources, key=lambda one: self._order.get(id(one), -1))
        return node.outputs[_KEPT_OFFSETS] if node.op == KEEP_TOKENS.name else offsets_of(node)

    def _number(self, key: str, value: list[int]) -> gs.Tensor:
        return constant(f"{self._name}/{key}", np.array(value, np.int64))

    def _node(self, op: str, inputs: list[gs.Tensor], name: str, dtype: object, **attrs: object) -> gs.Variable:
        return insert(self._graph, op, inputs, name, attrs=attrs, dtype=dtype)


def bars_token_dial(later: str) -> str | None:
    """Why the pass `later` cannot run after a pass with such a dial, or None. Serves `Pass.bars`."""
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
    """Whether a Reshape of [batch, tokens, width] produced the rows of `x`."""
    while x.inputs:
        node = x.inputs[0]
        if node.op == "Reshape":
            source = node.inputs[0].shape
            return source is not None and len(source) == 3 and source[-1] == x.shape[-1]
        if not node.inputs or node.inputs[0].shape is None or len(node.inputs[0].shape) != 2:
            return False
        x = node.inputs[0]
    return False
