"""The routers of a model at work: which groups their scores choose, and the masks that follow."""

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
"""τ: groups of this score or more are computed."""
_SHARE = 0.95  # of cumulative selection at first, as in the derivative of LTE for openPangu


def choose(logits: Tensor, select: Select, cut: float | Tensor) -> Tensor:
    """Which groups are computed, bool, of logits [..., groups]: at least the best one.

    Args:
        select: "threshold": those whose logit is `cut` or more. "cumulative": the best ones, in falling order of their
            scores, until the share `cut` of the sum of all scores is reached.
    """
    best = logits.argmax(-1, keepdim=True)
    if select == "threshold":
        return (logits >= cut).scatter_(-1, best, True)
    scores = logits.sigmoid()
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    wanted = before < cut * scores.sum(-1, keepdim=True)
    return torch.zeros_like(wanted).scatter_(-1, order, wanted).scatter_(-1, best, True)


class Routing(nn.Module):
    """The routers of a model, at work between up and down projections.

    Args:
        ffns: of the model, whose modules get hooks.
        group: neurons per group.

    Attributes:
        routers: number of the FFN → its router.
        cut: what `choose` takes; of "threshold" subtracted from the logits of soft masks, too.
        mode: "dense" lets all pass; "hard" multiplies activations by 1 for chosen groups and 0 for the others; "soft"
            does so, too, where `masks` is "straight", and gives scores the gradient of these numbers, of groups that
            are not chosen as well; where it is "scores", it multiplies activations by scores.
        logits: of the last forward pass, number of the FFN → [..., groups].
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
            # bound methods go along where the model is copied
            ffn.up.module.register_forward_pre_hook(partial(self._read, str(ffn.layer)))
        self.mask({ffn.layer: ffn.down for ffn in ffns})

    def mask(self, downs: Mapping[int, nn.Module]) -> None:
        """Mask what these modules read, number of the FFN → its down projection, and no longer what others do."""
        for handle in self._masks:
            handle.remove()
        self._masks = [down.register_forward_pre_hook(partial(self._mask, str(layer))) for layer, down in downs.items()]

    @classmethod
    def of(cls, ffns: Sequence[FFNModules], learned: Mapping[str, np.ndarray]) -> Routing:
        """Routers that were learned before, frozen and at work: hard masks.

        Args:
            learned: as `tensors` gives them; FFNs without a router compute all groups.
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
        """Of the FFN of this number."""
        router = self.routers[str(layer)]
        assert isinstance(router, Router)
        return router

    def begin(self) -> None:
        """Forget the last forward pass."""
        self.logits = {}

    def scores(self, logits: Tensor) -> Tensor:
        """G(x), 0 to 1, of logits [..., groups]."""
        return (logits - self.cut).sigmoid() if self.select == "threshold" else logits.sigmoid()

    def chosen(self, logits: Tensor) -> Tensor:
        """Which groups are computed, bool [..., groups]."""
        return choose(logits, self.select, self.cut)

    def soft_mask(self, logits: Tensor) -> Tensor:
        """What the soft stage multiplies activations by, [..., groups]; its gradient is that of the scores."""
        scores = self.scores(logits)
        return scores if self.masks == "scores" else self.chosen(logits) + (scores - scores.detach())

    def tensors(self) -> dict[str, np.ndarray]:
        """As the pass `ffn-route` reads them from a Profile, float32."""
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
    """The tensors whose names begin so, by the rest of them."""
    return {name.removeprefix(prefix): learned[name] for name in learned if name.startswith(prefix)}
