"""Matches feed-forward blocks: from a down projection back, through elementwise nodes, to one projection or two."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.anatomy.activation import evaluate, find_gate, is_elementwise, is_linear, name_of
from trimtab.passes.anatomy.model import FFN, Activation
from trimtab.passes.anatomy.scan import NORMS, SKIP_NORMS, Scan, only_producer
from trimtab.passes.graph import output_name_of
from trimtab.passes.graph.linear import Linear

_TOWARDS_RESIDUAL = NORMS | {"Add", "Cast", "Div", "Identity", "Mul", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
_NEAR = 64  # nodes visited between a down projection and its residual addition


@dataclass(frozen=True)
class Miss:
    """Projections that resemble an FFN, but that passes cannot rewrite.

    Attributes:
        linears: the projections; the down projection is the last.
        where: the node at which matching stopped.
        residual: True if the output is added to the residual stream; a classifier's output is not.
    """

    linears: tuple[Linear, ...]
    where: str
    why: str
    residual: bool


@dataclass
class _Trace:
    """The nodes before a tensor, back to the nearest projections."""

    leaves: list[Linear] = field(default_factory=list)
    nodes: list[gs.Node] = field(default_factory=list)
    stops: list[tuple[gs.Node | None, str]] = field(default_factory=list)
    behind: Linear | None = None  # the projection that the first stop reads


def find_ffns(scan: Scan) -> tuple[list[FFN], list[Miss]]:
    """All FFNs, in the order of computation, and the misses: projections that only resemble an FFN."""
    ffns: list[FFN] = []
    misses: list[Miss] = []
    for down in scan.linears:
        result = _match(scan, down, len(ffns))
        if isinstance(result, FFN):
            ffns.append(result)
        elif result is not None:
            misses.append(result)
    return ffns, misses


def _match(scan: Scan, down: Linear, layer: int) -> FFN | Miss | None:
    trace = _trace(scan, down.x)
    linears = (*trace.leaves, *([trace.behind] if trace.behind is not None else []))
    if not trace.nodes or not linears:
        return None
    residual = joins_residual(down.y)

    def miss(why: str, node: gs.Node | None = None) -> Miss:
        return Miss((*linears, down), output_name_of(node or down.nodes[-1]), why, residual)

    if trace.stops:
        node, why = trace.stops[0]
        return miss(why, node)
    if len(linears) > 2:
        return miss(f"{len(linears)} projections meet before the down projection, one or two were expected")
    nodes = scan.ordered(trace.nodes)
    up, gate = linears[0], None
    if len(linears) == 1:
        name = _name_ungated(nodes, up, down)
        if name is None:
            return None
    else:
        if linears[0].x is not linears[1].x:
            return miss("its two projections read different inputs", nodes[0])
        product = _name_gated(nodes, linears, down)
        if product is None:
            return miss("its two projections are not combined as act(gate) * up", nodes[-1])
        gate, up, name = product
    if up.out_features != down.in_features or up.in_features != down.out_features:
        return miss(f"it maps {up.in_features} features to {down.out_features}, not back to as many")
    if not residual:
        return miss("its output is not added to a residual stream")
    inputs = (up.y,) if gate is None else (gate.y, up.y)
    return FFN(layer, up, gate, down, Activation(name, nodes, inputs, down.x))


def _name_ungated(nodes: tuple[gs.Node, ...], up: Linear, down: Linear) -> str | None:
    def function(x: np.ndarray) -> np.ndarray:
        return evaluate(nodes, {id(up.y): x}, down.x)

    return None if is_linear(function) else name_of(function)


def _name_gated(
    nodes: tuple[gs.Node, ...], pair: tuple[Linear, ...], down: Linear
) -> tuple[Linear, Linear, str] | None:
    """(gate, up, name of the activation), from the two projections in `pair`."""

    def function(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return evaluate(nodes, {id(pair[0].y): a, id(pair[1].y): b}, down.x)

    match = find_gate(function)
    if match is None:
        return None
    gate, act = match
    return pair[gate], pair[1 - gate], name_of(act)


def _trace(scan: Scan, tensor: gs.Tensor) -> _Trace:
    trace = _Trace()
    seen = {id(tensor)}
    queue = deque([tensor])
    while queue:
        current = queue.popleft()
        linear = scan.producing(current)
        if linear is not None:
            trace.leaves.append(linear)
            continue
        node = only_producer(current)
        if node is None or not is_elementwise(node):
            _stop(scan, trace, current, node)
            continue
        trace.nodes.append(node)
        for source in node.inputs:
            if isinstance(source, gs.Constant):
                count = int(np.prod(source.shape, dtype=np.int64))
                if count != 1:
                    trace.stops.append(
                        (node, f"{node.op} with a constant of {count} values, only scalars can be moved")
                    )
            elif source.name and id(source) not in seen:
                seen.add(id(source))
                queue.append(source)
    return trace


def _stop(scan: Scan, trace: _Trace, tensor: gs.Tensor, node: gs.Node | None) -> None:
    """Record why the trace stops at `tensor`."""
    if node is None:
        trace.stops.append((None, f"it depends on {tensor.name!r}, an input of the graph"))
        return
    trace.behind = trace.behind or (scan.producing(node.inputs[0]) if node.inputs else None)
    if trace.behind is not None and node.op in ("Split", "Slice", "Gather"):
        trace.stops.append((node, f"gate and up projections are packed into one and taken apart by {node.op}"))
    else:
        trace.stops.append((node, f"{node.op} between the projections is not a known elementwise op"))


def joins_residual(y: gs.Tensor) -> bool:
    """True if `y`, perhaps normalised or scaled, is added to another computed tensor."""
    seen: set[int] = set()
    queue = deque([y])
    while queue and len(seen) < _NEAR:
        tensor = queue.popleft()
        for node in tensor.outputs:
            if node.op in SKIP_NORMS:
                return True
            if id(node) in seen or node.op not in _TOWARDS_RESIDUAL:
                continue
            seen.add(id(node))
            if node.op == "Add" and not any(isinstance(t, gs.Constant) for t in node.inputs):
                return True
            queue.extend(node.outputs)
    return False
