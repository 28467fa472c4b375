"""The routers of a model during training: the groups that their scores choose, and the masks of activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trimtab.training.linears import FFNModules
from trimtab.training.lte.router import CopyRouter, LinearRouter, Router

Mode = Literal["dense", "soft", "hard"]
Masks = Literal["straight", "scores"]
Form = Literal["linear", "copy"]
Select = Literal["threshold", "cumulative"]

THRESHOLD = 0.5
"""τ: groups with at least this score are computed."""
_SHARE = 0.95  # initial share of cumulative selection, as in openPangu's variant of LTE


def choose(logits: Tensor, select: Select, cut: float | Tensor) -> Tensor:
    """Which groups are computed for logits [..., groups], bool; at least the best one.

    Args:
        select: "threshold": groups whose logit is at least `cut`. "cumulative": the best groups in descending order of
            scores, until their sum reaches the share `cut` of the sum of all scores.
    """
    best = logits.argmax(-1, keepdim=True)
    if select == "threshold":
        return (logits >= cut).scatter_(-1, best, True)
    scores = logits.sigmoid()
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    selected = before < cut * scores.sum(-1, keepdim=True)
    return torch.zeros_like(selected).scatter_(-1, order, selected).scatter_(-1, best, True)


class Routing(nn.Module):
    """The routers of a model, which mask activations between up and down projections.

    Args:
        ffns: FFNs of the model; their modules get hooks.
        group: neurons per group.

    Attributes:
        routers: number of the FFN → its router.
        cut: argument of `choose`. With "threshold" it is also subtracted from the logits of soft masks.
        mode: "dense" masks nothing. "hard" multiplies activations by 1 for chosen groups and by 0 for others. "soft"
            with masks "straight" computes the same, and passes gradients to the scores of all groups; with masks
            "scores" it multiplies activations by scores.
        logits: number of the FFN → logits of the last forward pass, [..., groups].
    """

    cut: Tensor

    def __init__(
        self, ffns: Sequence[FFNModules], group: int, select: Select, masks: Masks = "straight", form: Form = "linear"
    ) -> None:
        super().__init__()
        self.group, self.select, self.masks = group, select, masks
        self.routers = nn.ModuleDict({str(ffn.layer): _router(form, ffn, group) for ffn in ffns})
        self.register_buffer("cut", torch.tensor(0.0 if select == "threshold" else _SHARE))
        self.mode: Mode = "dense"
        self.logits: dict[str, Tensor] = {}
        self._masks: list[RemovableHandle] = []
        for ffn in ffns:
            # bound methods are copied with the model
            ffn.up.module.register_forward_pre_hook(partial(self._read, str(ffn.layer)))
        self.mask({ffn.layer: ffn.down for ffn in ffns})

    def mask(self, downs: Mapping[int, nn.Module]) -> None:
        """Mask the inputs of these modules, number of the FFN → its down projection, instead of earlier ones."""
        for handle in self._masks:
            handle.remove()
        self._masks = [down.register_forward_pre_hook(partial(self._mask, str(layer))) for layer, down in downs.items()]

    @classmethod
    def of(cls, ffns: Sequence[FFNModules], learned: Mapping[str, np.ndarray]) -> Routing:
        """Routers from an earlier training, frozen, with hard masks.

        Args:
            learned: tensors in the format of `tensors`. FFNs without a router compute all groups.
        """
        of = {ffn.layer: _part(learned, f"router.{ffn.layer}.") for ffn in ffns}
        routed = [ffn for ffn in ffns if of[ffn.layer]]
        form: Form = "copy" if any("sizes" in each for each in of.values()) else "linear"
        by_threshold = "threshold" in learned
        group = routed[0].d_ff // len(next(iter(of[routed[0].layer].values()))) if routed else 1
        routing = cls(routed, group, "threshold" if by_threshold else "cumulative", form=form)
        cut = torch.from_numpy(learned["threshold" if by_threshold else "cumulative"])[0]
        routing.cut.copy_(cut.logit() if by_threshold else cut)
        for ffn in routed:
            routing.router(ffn.layer).restore(of[ffn.layer])
        routing.mode = "hard"
        return routing.requires_grad_(False)

    def router(self, layer: int | str) -> Router:
        """The router of the FFN with this number."""
        router = self.routers[str(layer)]
        assert isinstance(router, Router)
        return router

    def begin(self) -> None:
        """Drop the logits of the last forward pass."""
        self.logits = {}

    def scores(self, logits: Tensor) -> Tensor:
        """Scores G(x), 0 to 1, for logits [..., groups]."""
        return (logits - self.cut).sigmoid() if self.select == "threshold" else logits.sigmoid()

    def chosen(self, logits: Tensor) -> Tensor:
        """Which groups are computed, bool [..., groups]."""
        return choose(logits, self.select, self.cut)

    def soft_mask(self, logits: Tensor) -> Tensor:
        """The soft stage's factor of activations, [..., groups]; its gradient is that of the scores."""
        scores = self.scores(logits)
        return scores if self.masks == "scores" else self.chosen(logits) + (scores - scores.detach())

    def tensors(self) -> dict[str, np.ndarray]:
        """The tensors that the pass `ffn-route` reads from a Profile, float32."""
        by_threshold = self.select == "threshold"
        cut = float(self.cut)
        named = {"threshold": np.array([THRESHOLD], np.float32)} if by_threshold else {}
        if not by_threshold:
            named["cumulative"] = np.array([cut], np.float32)
        for layer in self.routers:
            learned = self.router(layer).tensors(cut if by_threshold else 0.0)
            named |= {f"router.{layer}.{key}": value for key, value in learned.items()}
        return named

    def _read(self, layer: str, up: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.mode != "dense":
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.mode == "soft"):
                self.logits[layer] = self.routers[layer](inputs[0])

    def _mask(self, layer: str, down: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        if self.mode == "dense":
            return None
        logits, (h,) = self.logits[layer], inputs
        mask = self.soft_mask(logits) if self.mode == "soft" else self.chosen(logits)
        return ((h.unflatten(-1, (-1, self.group)) * mask.to(h.dtype)[..., None]).flatten(-2),)


def _router(form: Form, ffn: FFNModules, group: int) -> Router:
    return CopyRouter(ffn, group) if form == "copy" else LinearRouter(ffn.d_model, ffn.d_ff // group)


def _part(learned: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): learned[name] for name in learned if name.startswith(prefix)}
