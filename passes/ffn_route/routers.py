"""The routers of a model as stored in a Profile, and the groups that their scores choose."""

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
    """The routers that training has learned.

    Attributes:
        by_layer: number of an FFN → its router.
        threshold: score from which on a group is computed; None if `cumulative` is set.
        cumulative: share of the sum of all scores up to which the best groups are computed; None if `threshold` is set.
    """

    by_layer: dict[int, Router]
    threshold: float | None
    cumulative: float | None

    @classmethod
    def of(cls, learned: Mapping[str, np.ndarray]) -> Routers:
        """Read routers from the tensors of a Profile.

        Raises:
            ProfileError: the tensors have another form than training writes.
        """
        routers: dict[int, Router] = {}
        for name, values in learned.items():
            match = re.fullmatch(r"router\.(\d+)\.(weight|sizes)", name)
            if match is None:
                continue
            layer, values = int(match[1]), values.astype(np.float32)
            damaged = ProfileError(f"the router of FFN {layer} in the profile is damaged", hint=HINT)
            if values.ndim != 2 or not values.size or not np.isfinite(values).all() or layer in routers:
                raise damaged
            if match[2] == "sizes":
                if values.min(initial=0) < 0:
                    raise damaged
                routers[layer] = CopyRouter(values)
                continue
            bias = learned.get(f"router.{layer}.bias")
            if bias is None or bias.shape != values.shape[:1] or not np.isfinite(bias).all():
                raise damaged
            routers[layer] = LinearRouter(values, bias.astype(np.float32))
        cuts = [_share(learned.get(name), name) for name in ("threshold", "cumulative")]
        if routers and (cuts[0] is None) == (cuts[1] is None):
            raise ProfileError("the profile has routers, and not one of threshold and cumulative", hint=HINT)
        return cls(dict(sorted(routers.items())), *cuts)

    @property
    def opset(self) -> int:
        """The lowest opset that the routers' nodes need."""
        return max((router.opset for router in self.by_layer.values()), default=0)

    @property
    def default(self) -> float:
        """Default of the dial: the threshold, or 1 minus the cumulative share."""
        return self.threshold if self.threshold is not None else 1 - (self.cumulative or 0.0)

    def bound(self, ffns: Mapping[int, FFN]) -> Routers:
        """The routers, bound to their FFNs.

        Args:
            ffns: the FFNs of the model, by number.

        Raises:
            ProfileError: the routers belong to another model. The message names the first one that does not fit.
        """
        missing = self.by_layer.keys() - ffns.keys()
        if missing:
            raise ProfileError(
                f"the profile has a router of FFN {min(missing)}, and the model has {len(ffns)} FFNs", hint=HINT
            )
        return replace(self, by_layer={layer: router.bound(ffns[layer]) for layer, router in self.by_layer.items()})

    def in_integers(self) -> Routers:
        """The routers for FFNs whose weights are integers."""
        return replace(self, by_layer={layer: router.in_integers() for layer, router in self.by_layer.items()})

    def chosen(self, scores: np.ndarray, cut: float, max_groups: int | None = None) -> np.ndarray:
        """Which groups are computed for scores [tokens, groups], bool.

        Args:
            cut: value of the dial.
            max_groups: limit of the groups of one token; the best ones are kept. None: no limit.
        """
        order = np.argsort(-scores, axis=1, kind="stable")
        ordered = np.take_along_axis(scores, order, 1)
        reached = ordered
        if self.threshold is None:
            left = np.cumsum(ordered[:, ::-1], 1)[:, ::-1]
            reached = left / left[:, :1]
        taken = reached >= cut
        taken[:, 0] = True
        if max_groups is not None:
            taken[:, max_groups:] = False
        chosen = np.zeros_like(taken)
        np.put_along_axis(chosen, order, taken, 1)
        return chosen


def _share(value: np.ndarray | None, name: str) -> float | None:
    """Check that a value of the Profile is a number from 0 to 1."""
    if value is None:
        return None
    if value.size != 1 or not 0 <= value.item() <= 1:
        raise ProfileError(f"the {name} of the routers in the profile is damaged: no number from 0 to 1", hint=HINT)
    return float(value.item())
