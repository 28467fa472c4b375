"""What is compared: learned routers, and what leaves neurons out without any training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.passes.dials import Dial

SPARSITY, DENSITY, GROUP = "{sparsity}", "{density}", "{group}"
"""In a recipe, in place of what is asked for: the sparsity, its complement, and the neurons of a group."""

RANK = 16  # of what stands for the neurons that are left out
DENSITIES = (0.1, 0.2, 0.35, 0.5, 0.7)
"""Of methods without a dial, which are compiled for each."""


@dataclass(frozen=True)
class Curve:
    """A way to leave neurons out, at several settings.

    Attributes:
        passes: with SPARSITY, DENSITY and GROUP in place of what is asked for.
        routed: whether it runs the model that has learned routers, or the dense one.
        dials: dial → values beside its default and its exact one; without any dial, a build for each of `DENSITIES`.
    """

    name: str
    passes: tuple[Any, ...]
    routed: bool = False
    dials: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def builds(self, sparsity: float, group: int) -> Iterator[tuple[list[Any], dict[str, tuple[float, ...]]]]:
        """Passes of each build, and values of its dials."""
        densities = (1 - sparsity,) if self.dials else sorted({*DENSITIES, round(1 - sparsity, 4)})
        for density in densities:
            places = {SPARSITY: round(1 - density, 4), DENSITY: round(density, 4), GROUP: group}
            yield [_filled(each, places) for each in self.passes], dict(self.dials)

    def settings(self, dials: Sequence[Dial], values: dict[str, tuple[float, ...]]) -> list[dict[str, float]]:
        """Settings to measure at, those of the dial that is moved in order; none of a build without."""
        if not dials:
            return [{}]
        (dial,) = dials
        return [{dial.name: value} for value in sorted({*values.get(dial.name, ()), dial.default})]


def _filled(value: Any, places: dict[str, float]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(each, places) for key, each in value.items()}
    return places.get(value, value) if isinstance(value, str) else value


_REST = {"rest": {"rank": RANK}}
_LEARNED: dict[str, Any] = {"most": 1.0}
_FITTED: dict[str, Any] = {"router": "fitted", "sparsity": SPARSITY, "group": GROUP, "most": 1.0}
_THRESHOLD: dict[str, Any] = {"sparsity": SPARSITY, "most": 1.0}
_TOPK: dict[str, Any] = {"density": DENSITY, "take": DENSITY, "rank": RANK, "most": 1.0, "dense_above": 1 << 30}

_SCORES = (("route_threshold", (0.0, 0.2, 0.35, 0.42, 0.65, 0.8)),)
_SHARES = (("ffn_sparsity", (0.3, 0.5, 0.7, 0.9)),)
_SCORE, _SHARE = (("route_threshold", ()),), (("ffn_sparsity", ()),)

CURVES = (
    Curve("lte", ({"ffn-route": _LEARNED},), routed=True, dials=_SCORES),
    Curve("moefication", ({"ffn-route": _FITTED},), dials=_SCORES),
    Curve("threshold", ({"ffn-threshold": _THRESHOLD},), dials=_SHARES),
    Curve("topk", ({"ffn-topk": _TOPK},)),
    Curve("lte + rest", ({"ffn-route": _LEARNED | _REST},), routed=True, dials=_SCORE),
    Curve("moefication + rest", ({"ffn-route": _FITTED | _REST},), dials=_SCORE),
    Curve("threshold + rest", ({"ffn-threshold": _THRESHOLD | _REST},), dials=_SHARE),
)
