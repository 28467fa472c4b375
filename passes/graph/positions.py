"""Computes the maximum number of tokens of a model, from the indices of its position tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.graph.limits import Positions
from trimtab.passes.graph.part import nodes_between, open_part
from trimtab.passes.graph.ranges import table_rows
from trimtab.passes.graph.weights import stored_bytes

_FILLS = (0, 1, 2, 3)
"""Token ids of the test texts. Where padding has no position, the graph knows it by its id, mostly one of these."""
_NODES = 64
"""Maximum number of nodes between the inputs and an index. Position indices need fewer."""
_BYTES = 1 << 26
"""Maximum bytes of the constants that these nodes read."""


def find_positions(graph: gs.Graph) -> Positions | None:
    """The maximum length of a text in `graph`; None without a limit, as with rotary or relative positions.

    Indices of constant tables, and slices of constants, are computed for texts of several lengths, apart from the rest
    of the graph, to find the length at which an index exceeds its table or a slice is too short.
    """
    ids = next((tensor for tensor in graph.inputs if tensor.name == "input_ids"), None)
    if ids is None or ids.shape is None or len(ids.shape) != 2:
        return None
    limits = [positions for point in _points(graph) if (positions := point.positions()) is not None]
    limits += [Positions(rows, padding=True) for node in graph.nodes if (rows := _rotary_rows(node)) is not None]
    return min(limits, key=lambda each: (each.most, not each.padding), default=None)


def _rotary_rows(node: gs.Node) -> int | None:
    """Rows of the cosine table of an attention that counts positions itself, including past and padding."""
    cosines = node.inputs[7] if node.op == "GroupQueryAttention" and len(node.inputs) > 7 else None
    if not node.attrs.get("do_rotary") or not isinstance(cosines, gs.Constant):
        return None
    return int(cosines.shape[0])


def _points(graph: gs.Graph) -> Iterator[_Point]:
    """The computed indices of constant tables, and the slices of constants, in `graph`."""
    for node in graph.nodes:
        for index in node.inputs:
            if isinstance(index, gs.Variable) and (index.inputs or index.name == "position_ids"):
                for rows in table_rows(node, index):
                    yield _Point(graph, index, rows)
        if node.op == "Slice" and isinstance(node.inputs[0], gs.Constant):
            yield _Point(graph, node.outputs[0], None)


class _Point:
    """A tensor that is computed for each token of a text.

    Args:
        rows: rows of the table that the tensor indexes; None for a slice.
    """

    def __init__(self, graph: gs.Graph, tensor: gs.Tensor, rows: int | None) -> None:
        self._tensor, self._rows = tensor, rows
        self._nodes = list(nodes_between([], [tensor]))
        read = {id(each) for node in self._nodes for each in node.inputs}
        self._inputs = [each for each in graph.inputs if id(each) in read]
        self._graph = graph

    def positions(self) -> Positions | None:
        """The limit that this tensor sets; None without one, or if the tensor does not depend on the length."""
        if not self._nodes:
            return Positions(self._rows, padding=True) if self._rows else None
        constants = [each for node in self._nodes for each in node.inputs if isinstance(each, gs.Constant)]
        if (
            len(self._nodes) > _NODES
            or sum(map(stored_bytes, constants)) > _BYTES
            or any(node.domain for node in self._nodes)
        ):
            return None
        run = self._open()
        if run is None:
            return None
        end = 1 + max([self._rows or 0, *(int(size) for each in constants for size in each.shape)])
        limits = [
            (longest, fill) for fill in _FILLS if (longest := _last(partial(self._fits, run, fill), end)) is not None
        ]
        if not limits:
            return None
        longest, fill = min(limits)
        return Positions(longest, padding=not any(self._fits(run, fill, longest + 1, padding) for padding in _FILLS))

    def _open(self) -> _Run | None:
        if self._rows is not None:
            self._tensor.dtype = self._tensor.dtype or np.int64
        shapes = {each.name: [None] * len(each.shape or ()) for each in self._inputs}
        try:
            session = open_part(self._graph, [], [self._tensor], shapes)
        except Exception:  # ONNX Runtime's errors have no common base
            return None

        def run(feeds: dict[str, np.ndarray]) -> np.ndarray | None:
            try:
                (result,) = session.run(None, feeds)
            except Exception:
                return None
            return np.asarray(result)

        return run

    def _fits(self, run: _Run, fill: int, tokens: int, padding: int | None = None) -> bool:
        """Whether the table has enough rows, or the slice enough elements, for a text of `tokens`.

        Args:
            fill: the id of the tokens.
            padding: the id of the last token, which is padding; None without padding.
        """
        one, values = (
            run({each.name: _feed(each, self._graph, fill, count, padding) for each in self._inputs})
            for count in (1, tokens)
        )
        if one is None or values is None or values.size != one.size * tokens:
            return False
        return self._rows is None or bool(((values < self._rows) & (values >= -self._rows)).all())


_Run = Callable[[dict[str, np.ndarray]], "np.ndarray | None"]


def _last(fits: Callable[[int], bool], end: int) -> int | None:
    """The largest number below `end` that fits; None if `end` fits, too, or 2 does not."""
    if not fits(2) or fits(end):
        return None
    low, high = 2, end
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _feed(tensor: gs.Tensor, graph: gs.Graph, fill: int, tokens: int, padding: int | None) -> np.ndarray:
    """Values of an input for one text of `tokens`, with an empty past."""
    (columns,) = (each.shape[1] for each in graph.inputs if each.name == "input_ids")
    shape = [1] + [
        size if isinstance(size, int) and size >= 0 else tokens if len(tensor.shape) == 2 or size == columns else 0
        for size in tensor.shape[1:]
    ]
    values = np.zeros(shape, tensor.dtype)
    if tensor.name == "input_ids":
        values[:] = fill
    elif tensor.name == "position_ids":
        values[:] = np.arange(shape[-1])
    elif "mask" in tensor.name:
        values[:] = 1
    if padding is not None and len(shape) == 2 and (tensor.name == "input_ids" or "mask" in tensor.name):
        values[:, -1] = padding if tensor.name == "input_ids" else 0
    return values
