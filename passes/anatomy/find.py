"""Computes the Anatomy of a graph."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import onnx_graphsurgeon as gs

from trimtab.passes.anatomy.attention import find_attentions
from trimtab.passes.anatomy.blocks import find_blocks
from trimtab.passes.anatomy.experts import find_experts, router
from trimtab.passes.anatomy.ffn import Miss, find_ffns, joins_residual
from trimtab.passes.anatomy.model import FFN, Anatomy, Attention, Block, Unrecognized
from trimtab.passes.anatomy.opaque import find_opaque
from trimtab.passes.anatomy.parts import count_params, find_embeddings, find_norms, guess_family, make_head
from trimtab.passes.anatomy.scan import Scan
from trimtab.passes.errors import ModelError, RecipeError
from trimtab.passes.graph import output_name_of
from trimtab.passes.graph.linear import Linear


def find_anatomy(graph: gs.Graph) -> Anatomy:
    """The Anatomy of `graph`, which must be canonicalized.

    Matching reads structure, shapes and scalar constants, and loads no weights. The names of nodes and tensors and the
    order of nodes do not matter.
    """
    scan = Scan(graph)
    ffns, misses = find_ffns(scan)
    attentions = find_attentions(scan)
    norms, embeddings = find_norms(scan), find_embeddings(scan)
    ffns, blocks = _by_layers(ffns, find_blocks(scan, ffns, attentions, norms))
    head, unrecognized = _leftovers(scan, ffns, attentions, blocks, misses)
    return Anatomy(
        family=guess_family(scan, ffns, attentions, embeddings, norms),
        ffns=tuple(ffns),
        attentions=tuple(attentions),
        blocks=tuple(blocks),
        norms=tuple(norms),
        embeddings=tuple(embeddings),
        head=make_head(head, embeddings),
        params=count_params(scan),
        unrecognized=tuple(unrecognized),
    )


def _by_layers(ffns: list[FFN], blocks: list[Block]) -> tuple[list[FFN], list[Block]]:
    """`ffns` and `blocks`, with each FFN numbered like its layer.

    A Profile refers to FFNs by these numbers, so they must not change when a pass rewrites another FFN.
    """
    layers = {id(block.ffn): block.layer for block in blocks if block.ffn is not None}
    numbers = [layers.get(id(ffn), -1) for ffn in ffns]
    if numbers != sorted(set(numbers)) or -1 in numbers:  # an FFN is in no layer, or layers are parallel
        return ffns, blocks
    renamed = {id(ffn): replace(ffn, layer=number) for ffn, number in zip(ffns, numbers, strict=True)}
    return list(renamed.values()), [
        block if block.ffn is None else replace(block, ffn=renamed[id(block.ffn)]) for block in blocks
    ]


def select_ffns(anatomy: Anatomy, layers: Collection[int] | None) -> list[FFN]:
    """The FFNs whose numbers are in `layers`; all of them for None.

    Raises:
        RecipeError: the model has no FFN with one of the numbers.
    """
    unknown = set(layers or ()) - {ffn.layer for ffn in anatomy.ffns}
    if unknown:
        raise RecipeError(
            f"layers: the model has no FFN {min(unknown)}",
            hint=f"it has {len(anatomy.ffns)}: {', '.join(str(ffn.layer) for ffn in anatomy.ffns) or 'none'}",
        )
    return [ffn for ffn in anatomy.ffns if layers is None or ffn.layer in layers]


def require_ffns(anatomy: Anatomy) -> tuple[FFN, ...]:
    """The FFNs of `anatomy`.

    Raises:
        ModelError: there are none; the message lists the reasons that matching recorded.
    """
    if anatomy.ffns:
        return anatomy.ffns
    reasons = "; ".join(f"{u.what} at node {u.where}: {u.why}" for u in anatomy.unrecognized[:3])
    raise ModelError(
        "no FFN was found in the model" + (f" ({reasons})" if reasons else ""),
        hint="trimtab compiles transformers whose FFNs are two or three projections; see `trimtab inspect`",
    )


def _leftovers(
    scan: Scan, ffns: Sequence[FFN], attentions: Sequence[Attention], blocks: Sequence[Block], misses: Sequence[Miss]
) -> tuple[list[Linear], list[Unrecognized]]:
    """The projections that no block claims: those of the head, and those that should have belonged to a block."""
    parts = [*(ffn.linears for ffn in ffns), *(attention.linears for attention in attentions)]
    claimed = {id(linear.y) for linears in parts for linear in linears}
    in_layers = frozenset().union(*(block.nodes for block in blocks))  # such as the parts of a rewritten FFN
    misses = [miss for miss in misses if id(miss.linears[-1].y) not in claimed]
    after = scan.downstream([f.y for f in ffns] + [a.nodes[-1].outputs[0] for a in attentions])
    before = scan.upstream([f.x for f in ffns] + [t for a in attentions for n in a.nodes for t in n.inputs])
    missed = {id(linear.y) for miss in misses if miss.residual for linear in miss.linears}

    head: list[Linear] = []
    middle: list[Linear] = []
    for linear in scan.linears:
        last = id(linear.nodes[-1])
        if id(linear.y) in claimed or id(linear.y) in missed or last not in after:
            continue
        (middle if last in before or joins_residual(linear.y) else head).append(linear)
    heads = {id(linear.y) for linear in head}
    misses = [miss for miss in misses if id(miss.linears[-1].y) not in heads]
    head = [linear for linear in head if id(linear.nodes[-1]) not in in_layers]
    mixtures = find_experts(scan.nodes)
    routers = [score for experts in mixtures if (score := router(scan, experts)) is not None]
    explained = {id(linear.y) for linear in (*routers, *(linear for miss in misses for linear in miss.linears))}
    unknown = [linear for linear in middle if id(linear.y) not in explained]
    mixed = [Unrecognized("experts", experts.where, experts.why_left) for experts in mixtures]
    opaque = [*find_opaque(scan), *mixed]
    return head, [*opaque, *_unrecognized(misses, unknown), *_without_projections(attentions)]


def _unrecognized(misses: Sequence[Miss], unknown: Sequence[Linear]) -> list[Unrecognized]:
    like_ffns = [Unrecognized("FFN", miss.where, miss.why) for miss in misses]
    return like_ffns + [
        Unrecognized(
            f"projection {linear.in_features} -> {linear.out_features}",
            output_name_of(linear.nodes[-1]),
            "it belongs to no FFN and no attention block that was found",
        )
        for linear in unknown
    ]


def _without_projections(attentions: Sequence[Attention]) -> list[Unrecognized]:
    return [
        Unrecognized("attention", output_name_of(a.nodes[-1]), "its output projection was not found")
        for a in attentions
        if a.out is None
    ]
