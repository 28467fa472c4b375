"""Follows the residual stream, the tensors to which branches (attention, FFN) are added, from sum to sum."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from trimtab.passes.anatomy.scan import NORMS, SKIP_NORMS, Scan, keeps_rows, only_producer
from trimtab.passes.graph.cut import reads

_SAME = frozenset(["Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"])  # the rows stay rows
_RESHAPING = _SAME | {"Transpose"}
_AFFINE = frozenset(["Add", "Div", "Mul"])  # with a constant
_SPELLED = frozenset(["Div", "Mul", "Pow", "ReduceMean", "Sub"])  # ops of a written-out norm that read its input
_SKIP_SUM = 3  # output of a skip norm that holds the sum before the norm
_NEAR = 64  # nodes visited between a tensor of the stream and the addition that reads it


@dataclass(frozen=True)
class Norm:
    """A normalization.

    Attributes:
        node: the node in `Anatomy.norms`.
        source: the tensor that the norm reads.
        x: the same tensor before casts and reshapes.
        y: the output, after scale and bias.
    """

    node: gs.Node
    source: gs.Tensor
    x: gs.Tensor
    y: gs.Tensor


@dataclass(frozen=True)
class Segment:
    """One addition to the stream: y = x + branch(x), or y = norm(x + branch(x)) in post-norm models.

    Attributes:
        x, y: the stream before and after the addition.
        nodes: ids of the branch's nodes, from x to the addition.
        norms: nodes of the norms in the branch and of the norm that makes y.
        parallel: True if the branch reads an earlier tensor of the stream, not x.
    """

    x: gs.Tensor
    y: gs.Tensor
    nodes: frozenset[int]
    norms: tuple[gs.Node, ...]
    parallel: bool


@dataclass(frozen=True)
class _Sum:
    """The node that adds a branch to the stream. `nodes` and `parallel` are those of `Segment`."""

    node: gs.Node
    branch: gs.Tensor
    nodes: frozenset[int]
    parallel: bool


class Stream:
    """Follows the residual stream of a graph.

    Args:
        norms: the norms of the whole graph, as in `Anatomy.norms`.
    """

    def __init__(self, scan: Scan, norms: Sequence[gs.Node]) -> None:
        self._scan = scan
        self._norms = [norm for node in norms if (norm := _norm(node)) is not None]
        self._reading: dict[int, list[Norm]] = {}
        for norm in self._norms:
            for key in {id(norm.x), id(norm.source)}:
                self._reading.setdefault(key, []).append(norm)
        self._making = {id(norm.y): norm for norm in self._norms}

    def start(self, x: gs.Tensor, last: gs.Node) -> gs.Tensor | None:
        """The tensor of the stream that a branch reads, at `x` or before its norm; None if the branch is added
        to none of them.

        Args:
            last: the node that makes the branch's output.
        """
        for candidate in self._before(x):
            total = self._sum(candidate, None)
            if total is not None and id(last) in total.nodes:
                return candidate
        return None

    def follow(self, start: gs.Tensor) -> Iterator[Segment]:
        """The additions to the stream from `start` on, in the order of computation."""
        before, x = None, start
        while (total := self._sum(x, before)) is not None:
            segment = self._segment(x, total)
            yield segment
            before, x = x, segment.y

    def _before(self, tensor: gs.Tensor) -> Iterator[gs.Tensor]:
        """`tensor` and its sources through norms, projections and changes of shape, nearest first."""
        seen: set[int] = set()
        queue = deque([tensor])
        while queue and len(seen) < _NEAR:
            current = queue.popleft()
            if id(current) in seen or isinstance(current, gs.Constant):
                continue
            seen.add(id(current))
            yield current
            node, linear = only_producer(current), self._scan.producing(current)
            if linear is not None:
                queue.append(linear.x)
            elif id(current) in self._making:
                queue.append(self._making[id(current)].source)  # packed tokens are a reshaped stream
            elif node is not None and node.op in SKIP_NORMS:
                queue.extend(node.outputs[_SKIP_SUM:])
            elif node is not None and (node.op in _RESHAPING or _with_constant(node)):
                queue.extend(node.inputs[: 1 if node.op in _RESHAPING else 2])
            elif node is not None and node.op in ("Concat", "Gather", "Pad", "Slice"):  # windows of images
                queue.extend(node.inputs if node.op == "Concat" else node.inputs[:1])

    def _sum(self, x: gs.Tensor, before: gs.Tensor | None) -> _Sum | None:
        """The first node that adds to `x` a branch computed from `x` or from `before`, the stream's previous tensor."""
        roots = {id(t): t.inputs[0] if t.inputs else None for t in (x, before) if t is not None}
        sums = []
        for node, own in _additions(x):
            branch = node.inputs[1] if node.inputs[0] is own else node.inputs[0]
            if branch is own or isinstance(branch, gs.Constant):
                continue
            walked = self._branch(branch, roots)
            if walked is not None:
                nodes, reached = walked
                sums.append(_Sum(node, branch, nodes, id(x) not in reached))
        return min(sums, key=lambda total: self._scan.position[id(total.node)], default=None)

    def _branch(self, tensor: gs.Tensor, roots: dict[int, gs.Node | None]) -> tuple[frozenset[int], set[int]] | None:
        """The nodes from `roots` (tensor id → producer) to `tensor`, and the roots it depends on; None without any."""
        producers = {id(node): key for key, node in roots.items() if node is not None}
        position = self._scan.position
        first = min(-1 if node is None else position[id(node)] for node in roots.values())
        nodes: dict[int, gs.Node] = {}
        queue = deque([tensor])
        while queue:
            for node in queue.popleft().inputs:
                if id(node) not in nodes and id(node) not in producers and position[id(node)] > first:
                    nodes[id(node)] = node
                    queue.extend(reads(node))
        reached: set[int] = set()
        between: set[int] = set()  # without the nodes of masks and positions
        for node in sorted(nodes.values(), key=lambda node: position[id(node)]):
            for read in reads(node):
                at = {id(read)} & roots.keys() | {producers[id(n)] for n in read.inputs if id(n) in producers}
                reached |= at
                if at or any(id(n) in between for n in read.inputs):
                    between.add(id(node))
        return (frozenset(between), reached) if reached else None

    def _segment(self, x: gs.Tensor, total: _Sum) -> Segment:
        norms = [norm.node for norm in self._norms if id(norm.node) in total.nodes]
        if x.inputs and x.inputs[0].op in SKIP_NORMS and x is not x.inputs[0].outputs[0]:
            norms.insert(0, x.inputs[0])  # the skip norm that outputs x also outputs the branch's input
        y = total.node.outputs[0]
        # Where a branch reads a norm of the stream, or ends in one, a norm behind the sum is the next branch's, or the
        # last of the model.
        direct = any(id(node) in total.nodes and not self._enters_norm(node, x) for node in _users(x))
        post = direct and not self._is_normed(total.branch)
        if total.node.op in SKIP_NORMS:
            sums = total.node.outputs[_SKIP_SUM:]
            y = sums[0] if sums and sums[0].name else y
            norms += [total.node] if post and y is total.node.outputs[0] else []
        elif post and (after := self._only_norm(y)) is not None:
            y = after.y
            norms.append(after.node)
        return Segment(x, y, total.nodes, tuple(norms), total.parallel)

    def _only_norm(self, tensor: gs.Tensor) -> Norm | None:
        """The norm that is the only reader of `tensor`."""
        norms = self._reading.get(id(tensor), [])
        only = len(norms) == 1 and all(node is norms[0].node or _is_spelled(node) for node in _users(tensor))
        return norms[0] if only else None

    def _enters_norm(self, node: gs.Node, x: gs.Tensor) -> bool:
        return any(node is norm.node or _is_spelled(node) for norm in self._reading.get(id(x), ()))

    def _is_normed(self, tensor: gs.Tensor) -> bool:
        """True if `tensor` is a norm's output, perhaps scaled."""
        for _ in range(_NEAR):
            if id(tensor) in self._making:
                return True
            node = only_producer(tensor)
            if node is None or not (node.op in _RESHAPING or _with_constant(node)):
                return False
            tensor = next(t for t in node.inputs if not isinstance(t, gs.Constant))
        return False


def _norm(node: gs.Node) -> Norm | None:
    """The Norm of `node`, a node of `Anatomy.norms`; None for a skip norm, whose sum need not be a tensor."""
    if node.op in SKIP_NORMS:
        return None
    x, y = node.inputs[0], node.outputs[0]
    if node.op not in NORMS:  # the division of a norm that is written out
        if node.op == "Mul" and (root := only_producer(x)) is not None and root.op in ("Div", "Reciprocal"):
            x = node.inputs[1]
        while len(y.outputs) == 1 and (y.outputs[0].op in _SAME or _with_constant(y.outputs[0])):
            y = y.outputs[0].outputs[0]
    difference = only_producer(_bare(x))  # from the mean, perhaps a Sub before an RMSNormalization
    x = difference.inputs[0] if difference is not None and difference.op == "Sub" else x
    return Norm(node, x, _bare(x), y)


def _bare(tensor: gs.Tensor) -> gs.Tensor:
    """`tensor` before casts and reshapes."""
    while (node := only_producer(tensor)) is not None and node.op in _SAME:
        tensor = node.inputs[0]
    return tensor


def _users(tensor: gs.Tensor) -> Iterator[gs.Node]:
    """The nodes that read the values of `tensor`, directly or behind casts and reshapes."""
    for node in tensor.outputs:
        if node.op in _SAME or keeps_rows(node):
            yield from _users(node.outputs[0])
        elif node.op != "Shape":
            yield node


def _is_spelled(node: gs.Node) -> bool:
    """True for an op that may begin a written-out norm."""
    return node.op in _SPELLED and not _with_constant(node)


def _with_constant(node: gs.Node) -> bool:
    """True for an Add, Mul or Div of one computed tensor and a constant."""
    return node.op in _AFFINE and sum(isinstance(t, gs.Constant) for t in node.inputs) == 1


def _additions(x: gs.Tensor) -> Iterator[tuple[gs.Node, gs.Tensor]]:
    """The nodes that add a computed tensor to `x`, perhaps cast, scaled or reshaped, and the input that carries `x`."""
    seen: set[int] = set()
    queue = deque([x])
    while queue and len(seen) < _NEAR:
        tensor = queue.popleft()
        for node in tensor.outputs:
            if id(node) in seen:
                continue
            seen.add(id(node))
            if node.op in SKIP_NORMS or (node.op == "Add" and not _with_constant(node)):
                if any(t is tensor for t in node.inputs[:2]):
                    yield node, tensor
            elif node.op in _RESHAPING or _with_constant(node) or keeps_rows(node):
                queue.extend(node.outputs[:1])
