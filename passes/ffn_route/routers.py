"""The routers of a model, as a Profile keeps them, and which groups their scores choose."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from trimtab.passes.anatomy import FFN
from trimtab.passes.errors import ProfileError
from trimtab.passes.ffn_route.copy_router import CopyRouter
from trimtab.passes.ffn_route.router import HINT, LinearRouter, Router

METHOD = "lte"


@dataclass(frozen=True)
class Routers:
    """What training has learned.

    Attributes:
        by_layer: number of an FFN → its router.
        threshold: score at which a group is computed; None where `cumulative` chooses.
        cumulative: share of the sum of all scores up to which the best groups are computed; None likewise.
    """

    by_layer: dict[int, Router]
    threshold: float | None
    cumulative: float | None

    @classmethod
    def of(cls, learned: Mapping[str, np.ndarray]) -> Routers:
        """Out of the tensors of a Profile.

        Raises:
            ProfileError: they are not what the training writes.
        """
        found: dict[int, Router] = {}
        for name, values in learned.items():
            match = re.fullmatch(r"router\.(\d+)\.(weight|sizes)", name)
            if match is None:
                continue
            layer, values = int(match[1]), values.astype(np.float32)
            damaged = ProfileError(f"the router of FFN {layer} in the profile is damaged", hint=HINT)
            if values.ndim != 2 or not values.size or not np.isfinite(values).all() or layer in found:
                raise damaged
            if match[2] == "sizes":
                if values.min(initial=0) < 0:
                    raise damaged
                found[layer] = CopyRouter(values)
                continue
            bias = learned.get(f"router.{layer}.bias")
            if bias is None or bias.shape != values.shape[:1] or not np.isfinite(bias).all():
                raise damaged
            found[layer] = LinearRouter(values, bias.astype(np.float32))
        cuts = [_share(learned.get(name), name) for name in ("threshold", "cumulative")]
        if found and (cuts[0] is None) == (cuts[1] is None):
            raise ProfileError("the profile has routers, and not one of threshold and cumulative", hint=HINT)
        return cls(dict(sorted(found.items())), *cuts)

    @property
    def opset(self) -> int:
        """The least that their nodes need."""
        return max((router.opset for router in self.by_layer.values()), default=0)

    @property
    def default(self) -> float:
        """Of the dial: the threshold, or what the share leaves of 1."""
        return self.threshold if self.threshold is not None else 1 - (self.cumulative or 0.0)

    def bound(self, ffns: Mapping[int, FFN]) -> Routers:
        """The routers at work at their FFNs.

        Args:
            ffns: those of the model, by number.

        Raises:
            ProfileError: the routers are those of another model; says which does not fit, and why.
        """
        missing = self.by_layer.keys() - ffns.keys()
        if missing:
            raise ProfileError(
                f"the profile has a router of FFN {min(missing)}, and the model has {len(ffns)} FFNs", hint=HINT
            )
        return replace(self, by_layer={layer: router.bound(ffns[layer]) for layer, router in self.by_layer.items()})

    def in_integers(self) -> Routers:
        """The routers as they stand beside FFNs whose weights are integers."""
        return replace(self, by_layer={layer: router.in_integers() for layer, router in self.by_layer.items()})

    def chosen(self, scores: np.ndarray, cut: float, most: int | None = None) -> np.ndarray:
        """Which groups are computed, bool, of scores [tokens, groups].

        Args:
            cut: value of the dial.
            most: groups of one token, the best; no bound, if not given.
        """
        order = np.argsort(-scores, axis=1, kind="stable")
        ordered = np.take_along_axis(scores, order, 1)
        reached = ordered
        if self.threshold is None:
            left = np.cumsum(ordered[:, ::-1], 1)[:, ::-1]
            reached = left / left[:, :1]
        taken = reached >= cut
        taken[:, 0] = True
        if most is not None:
            taken[:, most:] = False
        found = np.zeros_like(taken)
        np.put_along_axis(found, order, taken, 1)
        return found


def _share(value: np.ndarray | None, name: str) -> float | None:
    """A number from 0 to 1 of the Profile."""
    if value is None:
        return None
    if value.size != 1 or not 0 <= value.item() <= 1:
        raise ProfileError(f"the {name} of the routers in the profile is damaged: no number from 0 to 1", hint=HINT)
    return float(value.item())
