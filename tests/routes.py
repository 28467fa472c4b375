"""Random routers for the FFNs of a graph, and a Profile that holds them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.profile import Profile, ProfileInfo


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
