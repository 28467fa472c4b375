"""An Anatomy as JSON and as tables: the parts of a model, the work of each, and the speed-up that is possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_graphsurgeon as gs

from trimtab.passes.anatomy import Anatomy, Head
from trimtab.passes.graph import stored_bytes
from trimtab.passes.graph.linear import Linear, distinct_bytes, distinct_params

_HEAVY = 0.25
"""Share of the FFN neurons that are computed in the second bound of `gains`."""


def describe(anatomy: Anatomy, *, tokens: int = 128) -> dict[str, Any]:
    """The description of a model, in JSON types.

    Args:
        tokens: sequence length at which the work of attention scores is counted.
    """
    parts = [_ffns(anatomy), _attention(anatomy, tokens), _embeddings(anatomy), _head(anatomy, tokens)]
    rest = anatomy.params - sum(part["params"] for part in parts)
    parts.append(_part("norms and others", max(rest, 0), 0, 0))
    head = anatomy.head
    return {
        "family": anatomy.family,
        "layers": anatomy.layers,
        "params": anatomy.params,
        "ffn": [
            {
                "layer": ffn.layer,
                "gated": ffn.gated,
                "activation": ffn.activation.name,
                "d_model": ffn.d_model,
                "d_ff": ffn.d_ff,
                "params": ffn.params,
            }
            for ffn in anatomy.ffns
        ],
        "attention": [
            {
                "layer": each.layer,
                "heads": each.heads,
                "kv_heads": each.kv_heads,
                "head_dim": each.head_dim,
                "fused": each.fused,
                "params": each.params,
            }
            for each in anatomy.attentions
        ],
        "head": head
        and {
            "tied": head.tied,
            "linears": [{"in_features": m.in_features, "out_features": m.out_features} for m in head.linears],
            "params": head.params,
        },
        "embeddings": [
            {"rows": int(e.table.shape[0]), "width": int(e.table.shape[1]), "params": e.params}
            for e in anatomy.embeddings
        ],
        "norms": len(anatomy.norms),
        "tokens": tokens,
        "parts": parts,
        "gains": _gains(parts),
        "unrecognized": [{"what": u.what, "where": u.where, "why": u.why} for u in anatomy.unrecognized],
    }


def _part(name: str, params: int, flops: float, read: int) -> dict[str, Any]:
    return {"part": name, "params": params, "flops_per_token": round(flops), "bytes_per_token": read}


def _products(linears: Sequence[Linear]) -> tuple[int, int]:
    """(FLOPs, bytes of weights) for one row through `linears`; weights that layers share are counted once."""
    return sum(2 * m.in_features * m.out_features for m in linears), distinct_bytes(linears)


def _ffns(anatomy: Anatomy) -> dict[str, Any]:
    linears = [m for ffn in anatomy.ffns for m in ffn.linears]
    flops, read = _products(linears)
    return _part("FFN", distinct_params(linears), flops, read)


def _attention(anatomy: Anatomy, tokens: int) -> dict[str, Any]:
    linears = [m for each in anatomy.attentions for m in each.linears]
    flops, read = _products(linears)
    flops += sum(
        4 * tokens * (a.heads or 0) * (a.head_dim or 0) for a in anatomy.attentions
    )  # QKᵀ and its product with V
    return _part("attention", distinct_params(linears), flops, read)


def _embeddings(anatomy: Anatomy) -> dict[str, Any]:
    tables = {id(e.table): e for e in anatomy.embeddings}.values()
    rows = sum(stored_bytes(e.table) // max(int(e.table.shape[0]), 1) for e in anatomy.embeddings)
    return _part("embeddings", sum(e.params for e in tables), 0, rows)


def _head(anatomy: Anatomy, tokens: int) -> dict[str, Any]:
    head: Head | None = anatomy.head
    if head is None:
        return _part("head", 0, 0, 0)
    tables = {id(e.table) for e in anatomy.embeddings}
    shared = sum(m.in_features * m.out_features for m in head.linears if id(m.weight) in tables)
    flops, read = _products(head.linears)
    return _part("head", head.params - shared, flops / (tokens if _once_per_text(head.linears[0].x) else 1), read)


def _once_per_text(x: gs.Tensor) -> bool:
    """True for [batch, features]: the head reads one vector per text."""
    return x.shape is not None and len(x.shape) == 2


def _gains(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Upper bounds of the speed-up by Amdahl's law, for compute (many tokens) and for bytes read (one token).

    `free`: FFNs cost nothing. `heavy_25`: a quarter of their neurons is computed, and the rest costs nothing.
    """
    gains: dict[str, Any] = {}
    for key, what in (("flops_per_token", "flops"), ("bytes_per_token", "bytes")):
        total = sum(part[key] for part in parts)
        share = parts[0][key] / total if total else 0.0
        gains[what] = {
            "ffn_share": share,
            "free": 1 / (1 - share) if share < 1 else None,
            "heavy_25": 1 / (1 - (1 - _HEAVY) * share),
        }
    return gains


def summary(report: dict[str, Any]) -> str:
    """One line that describes the model."""
    ffn = report["ffn"][0] if report["ffn"] else None
    kind = (
        f"{ffn['activation']}{', gated' if ffn['gated'] else ''}, {ffn['d_model']} -> {ffn['d_ff']}" if ffn else "none"
    )
    attention = report["attention"][0] if report["attention"] else None
    heads = (
        f"{attention['heads']} heads ({attention['kv_heads']} key-value) of {attention['head_dim']}"
        if attention
        else "none"
    )
    return (
        f"{report['family']}: {report['layers']} layers, {report['params'] / 1e6:.1f} M parameters; "
        f"FFN {kind}; attention {heads.replace('None', '?')}"
    )


def cost_rows(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(part, parameters, MFLOPs per token, MB per token), each with its share of the whole."""

    def cell(part: dict[str, Any], key: str) -> str:
        total = sum(p[key] for p in report["parts"]) or 1
        return f"{part[key] / 1e6:.2f} ({100 * part[key] / total:.0f} %)"

    return [
        (p["part"], cell(p, "params"), cell(p, "flops_per_token"), cell(p, "bytes_per_token")) for p in report["parts"]
    ]


def gain_lines(report: dict[str, Any]) -> list[str]:
    """The possible speed-ups, in words."""
    if not report["ffn"]:
        return ["No FFN was found: there is nothing that trimtab could make smaller."]
    lines = []
    for key, what in (
        ("flops", "compute-bound (many tokens at once)"),
        ("bytes", "memory-bound (one token at a time)"),
    ):
        gain = report["gains"][key]
        free = f"{gain['free']:.2f}x" if gain["free"] else "any"
        lines.append(
            f"{what}: FFNs are {100 * gain['ffn_share']:.0f} % of the {key}; at most {gain['heavy_25']:.2f}x faster "
            f"with {100 * _HEAVY:.0f} % of the neurons, {free} without FFNs"
        )
    return lines
