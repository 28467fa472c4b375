"""Groups attention blocks and FFNs into layers, by following the residual stream from one attention to the next."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from trimtab.passes.anatomy.model import FFN, Attention, Block
from trimtab.passes.anatomy.scan import Scan
from trimtab.passes.anatomy.stream import Segment, Stream


def find_blocks(
    scan: Scan, ffns: Sequence[FFN], attentions: Sequence[Attention], norms: Sequence[gs.Node]
) -> list[Block]:
    """All layers in the order of computation.

    A layer begins at an attention, or at an FFN that no attention precedes, and ends where the next layer begins. An
    unrecognised branch, such as an FFN that a pass has rewritten, belongs to the layer of the attention before it.
    """
    stream = Stream(scan, norms)
    unordered: list[FFN | Attention] = [*attentions, *ffns]
    parts = sorted(unordered, key=lambda part: scan.position[id(_last(part))])
    claimed: set[int] = set()  # nodes of all branches so far
    blocks: list[Block] = []
    for part in parts:
        if id(_last(part)) in claimed:
            continue
        start = stream.start(_input(part), _last(part))
        segments = list(stream.follow(start)) if start is not None else []
        claimed |= {node for segment in segments for node in segment.nodes}
        blocks += _blocks(segments, ffns, attentions, len(blocks))
    return blocks


def _last(part: FFN | Attention) -> gs.Node:
    """The node that makes the part's output."""
    if isinstance(part, FFN):
        return part.down.nodes[-1]
    return part.nodes[-1] if part.out is None else part.out.nodes[-1]


def _input(part: FFN | Attention) -> gs.Tensor:
    if isinstance(part, FFN):
        return part.x
    linear = part.q or part.k or part.v
    return part.nodes[0].inputs[0] if linear is None else linear.x


def _blocks(
    segments: Sequence[Segment], ffns: Sequence[FFN], attentions: Sequence[Attention], first: int
) -> list[Block]:
    """The layers of one stream, numbered from `first` on."""
    groups: list[list[tuple[Segment, Attention | None, FFN | None]]] = []
    for segment in segments:
        attention = next((a for a in attentions if id(_last(a)) in segment.nodes), None)
        ffn = next((f for f in ffns if id(_last(f)) in segment.nodes), None)
        full = groups and any(other is not None for _, _, other in groups[-1])
        if not groups or attention is not None or (ffn is not None and full):
            groups.append([])
        groups[-1].append((segment, attention, ffn))
    return [_block(group, number) for number, group in enumerate(groups, first)]


def _block(group: Sequence[tuple[Segment, Attention | None, FFN | None]], layer: int) -> Block:
    segments = [segment for segment, _, _ in group]
    attention = group[0][1]
    in_turn = attention is not None and len(segments) > 1 and not segments[1].parallel
    return Block(
        layer=layer,
        x=segments[0].x,
        middle=segments[0].y if in_turn else None,
        y=segments[-1].y,
        attention=attention,
        ffn=next((ffn for _, _, ffn in group if ffn is not None), None),
        norms=tuple(
            {id(node): node for segment in segments for node in segment.norms}.values()
        ),  # branches may share one
        nodes=frozenset().union(*(segment.nodes for segment in segments)),
    )
