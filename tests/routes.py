"""Random routers for the FFNs of a graph, a Profile that holds them, and what ffn-route makes of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from dialects import ACTIVATIONS
from rewrite import session

from trimtab.passes import PassContext, PassResult, run_passes
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.ffn_route.route import FFNRoute
from trimtab.passes.graph import save_graph
from trimtab.passes.profile import Profile, ProfileInfo
from trimtab.passes.sampled_ffn import FFNWeights
from trimtab.passes.sparse_ffn.rows import quantize_rows

CLEAR = 1e-4
"""How far scores are from the dial, where float32 has to decide as float64 does."""


def groups_of(d_ff: int, rng: np.random.Generator) -> int:
    """A number of groups that divides `d_ff`, of 2 neurons or more."""
    return int(rng.choice([n for n in range(2, d_ff // 2 + 1) if d_ff % n == 0]))


def random_routers(graph: gs.Graph, rng: np.random.Generator, **cut: float) -> dict[str, np.ndarray]:
    """As training names them; scores are spread around a half.

    Args:
        cut: threshold or cumulative.
    """
    made = {name: np.array([value], np.float32) for name, value in (cut or {"threshold": 0.5}).items()}
    for ffn in find_anatomy(graph).ffns:
        groups = groups_of(ffn.d_ff, rng)
        weight = rng.standard_normal((groups, ffn.d_model)) * 2 / np.sqrt(ffn.d_model)
        made[f"router.{ffn.layer}.weight"] = weight.astype(np.float32)
        made[f"router.{ffn.layer}.bias"] = rng.standard_normal(groups).astype(np.float32)
    return made


def profile_with(learned: dict[str, np.ndarray], method: str = "lte", **more: np.ndarray) -> Profile:
    tensors = {f"learned.{method}.{name}": value for name, value in learned.items()} | more
    return Profile(ProfileInfo(model="m", data="d", samples=1, tokens=1), tensors)


def chosen(learned: dict[str, np.ndarray], layer: int, x: np.ndarray, dial: Any) -> tuple[np.ndarray, np.ndarray]:
    """Which groups the tokens x [tokens, d_model] compute, bool [tokens, groups], in float64; and how clear that is.

    Args:
        dial: one number, or one for each token.
    """
    weight, bias = (learned[f"router.{layer}.{part}"].astype(np.float64) for part in ("weight", "bias"))
    scores = 1 / (1 + np.exp(-(x.astype(np.float64) @ weight.T + bias)))
    level = np.broadcast_to(np.asarray(dial, np.float64).reshape(-1, 1), (len(x), 1))
    reached = scores
    if "cumulative" in learned:
        order = np.argsort(-scores, 1)
        ordered = np.take_along_axis(scores, order, 1)
        before = (np.cumsum(ordered, 1) - ordered) / ordered.sum(1, keepdims=True)
        reached = np.empty_like(scores)
        np.put_along_axis(reached, order, 1 - before, 1)
    best = np.arange(scores.shape[1]) == scores.argmax(1)[:, None]
    ranked = np.sort(scores, 1)
    clear = np.where(level[:, 0] > 0, np.abs(reached - level).min(1), 1)
    taken = (reached >= level) | best
    # Of two scores that are all but equal, float32 may put either first, and a share of the sum takes the first alone.
    gap = np.where(taken, scores, np.inf).min(1) - np.where(taken, -np.inf, scores).max(1)
    clear = np.where(gap > 1e-6, clear, 0)
    return taken, np.minimum(clear, ranked[:, -1] - ranked[:, -2])


def routed(graph: gs.Graph, learned: dict[str, np.ndarray], *before: Any, **options: Any) -> list[PassResult]:
    return run_passes(graph, [*before, FFNRoute.model_validate(options)], PassContext(profile_with(learned)))


def run(path: Path, feeds: dict[str, np.ndarray], dial: Any = None) -> list[np.ndarray]:
    engine = session(path)
    if dial is not None:
        feeds = feeds | {"route_threshold": np.full(len(next(iter(feeds.values()))), dial, np.float32)}
    return engine.run(None, {i.name: feeds[i.name] for i in engine.get_inputs()})


def watch(graph: gs.Graph, read: dict[int, gs.Tensor], path: Path) -> None:
    """Save a model whose outputs are, of each FFN, what it reads and what the sparse ops make of it."""
    tensors = graph.tensors()
    made = {
        layer: tensors.get(f"ffn-route/layer.{layer}/shift") or tensors[f"ffn-route/layer.{layer}/down.y"]
        for layer in read
    }
    graph.outputs = [t for layer, x in read.items() for t in (x, made[layer])]
    save_graph(graph, path)


def ffn_of(
    x: np.ndarray, w: FFNWeights, activation: str, gated: bool, groups: np.ndarray, integers: bool
) -> np.ndarray:  # fmt: skip
    """Of x [tokens, d_model] and the groups that each token computes, [tokens, groups]: y, in float64."""

    def rows(weight: np.ndarray) -> np.ndarray:
        q, scale = quantize_rows(weight)
        return q * scale[:, None].astype(np.float64) if integers else weight.astype(np.float64)

    pre = [
        x.astype(np.float64) @ rows(np.ascontiguousarray(up.T)).T + (0 if b is None else b)
        for up, b in zip(w.ups, w.up_biases, strict=True)
    ]
    h = ACTIVATIONS[activation](pre[0]) * (pre[1] if gated else 1)
    mask = np.repeat(groups, h.shape[1] // groups.shape[1], 1)
    return np.asarray((h * mask) @ rows(w.down) + w.down_bias)
