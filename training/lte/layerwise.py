"""Fits each FFN separately: some groups of its neurons learn to reproduce its dense outputs on recorded inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trimtab.training.activations import ACTIVATIONS
from trimtab.training.clock import Clock, schedule
from trimtab.training.device import bfloat16_is_fast
from trimtab.training.linears import FFNModules, rows
from trimtab.training.lte.control import fit_cut
from trimtab.training.lte.record import Recorded
from trimtab.training.lte.router import LinearRouter
from trimtab.training.lte.routers import Routing
from trimtab.training.lte.settings import Settings

_ROUTERS = 0.2  # share of an FFN's time in which its router learns, before its weights do
_ROUTER_RATE = 0.01  # learning rate for standardised inputs
_ROWS = 512  # tokens per step
_AT_A_TIME = 4096  # tokens that the dense FFN computes together
_NUMBERS = 1 << 26  # limit of the contributions that are compared; beyond it, only every n-th token counts
_REFIT = 100  # steps after which routers of copied weights are fitted to the density again
_RIDGE = 0.01  # relative to the inputs' mean variance
_RARE = 0.01  # lower bound of the shares of tokens that need a group and that do not: logits stay finite


class LayerFit:
    """The training of one FFN.

    Args:
        routing: routers of the whole model; the hooks mask the FFN's activations.
        recorded: recorded inputs of the FFN.
        density: share of its groups to compute. A token that needs no group computes its best one in addition.
    """

    def __init__(
        self, ffn: FFNModules, routing: Routing, recorded: Recorded, density: float, settings: Settings
    ) -> None:
        self._ffn, self._routing, self._settings = ffn, routing, settings
        self._x, self._weights = (torch.from_numpy(np.array(each)).to(rows(ffn.down).device) for each in recorded)
        self._router = routing.router(ffn.layer)
        self._y, added = contributions(ffn, routing, self._x, self._weights)
        self._needed = (added >= least(added, density)) & (added > 0)
        self._density = float(self._needed.sum(-1).clamp_min(1).double().mean()) / self._needed.shape[1]
        self._unit = self._y.square().sum(-1).mean().clamp_min(1e-12)
        self._begin()

    def run(self, clock: Clock, generator: torch.Generator, progress: Callable[[float], None]) -> tuple[int, float]:
        """Train until the clock ends the run.

        Returns:
            number of steps, and the relative error ‖y - dense‖² / ‖dense‖² over the weighted recorded tokens.
        """
        weights = [parameter for module in self._ffn.modules.values() for parameter in module.parameters()]
        routers = list(self._router.parameters())
        follows = not isinstance(self._router, LinearRouter)  # copies know what neurons add, and follow the weights
        learns = 0.0 if follows else _ROUTERS
        phases: list[tuple[float, float, list[Any], float, Callable[[Tensor], Tensor]]] = [
            (0.0, learns, routers, _ROUTER_RATE, self._router_loss),
            (learns, 1.0, weights, self._settings.layer_lr, self._weights_loss),
        ]
        step = 0
        for begin, end, parameters, rate, loss_of in phases:
            for parameter in (*weights, *routers):
                parameter.requires_grad_(any(parameter is each for each in parameters))
            optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
            while (at := clock.at(step)) < end:
                for group in optimizer.param_groups:
                    group["lr"] = rate * schedule((at - begin) / (end - begin))
                some = self._some(generator, weighed=parameters is weights)
                optimizer.zero_grad()
                loss_of(some).backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                step += 1
                if follows and step % _REFIT == 0:
                    self._fit_bias()
                progress(min(at, 1.0))
            self._fit_bias()
        return step, self._error()

    def _some(self, generator: torch.Generator, weighed: bool) -> Tensor:
        """Indices of random tokens for a step, drawn uniformly or in proportion to their weights."""
        count = min(_ROWS, len(self._x))
        if weighed and self._weights.any():
            some = torch.multinomial(self._weights.cpu(), count, replacement=True, generator=generator)
        else:
            some = torch.randint(len(self._x), (count,), generator=generator)
        return some.to(self._x.device)

    @torch.no_grad()
    def _begin(self) -> None:
        """Fit the router in closed form, so that it also works without a training step.

        The fit is least squares of p(needed | x) around the share p of tokens that need the group, as a logit to first
        order. Copy routers only need a density.
        """
        if not isinstance(self._router, LinearRouter):
            self._fit_bias()
            return
        x = (self._x - self._router.mean) * self._router.scale
        needed = self._needed.float()
        share = needed.mean(0).clamp(_RARE, 1 - _RARE)
        moments = x.T @ x / len(x)
        moments.diagonal().add_(_RIDGE * moments.diagonal().mean() + 1e-12)
        slopes = torch.linalg.solve(moments, x.T @ (needed - share) / len(x))
        self._router.weight.copy_((slopes / (share * (1 - share))).T)
        self._router.bias.copy_(share.logit())
        self._fit_bias()

    def _router_loss(self, some: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(self._router(self._x[some]), self._needed[some].float())

    def _weights_loss(self, some: Tensor) -> Tensor:
        self._routing.mode = "hard"
        device = self._x.device
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16_is_fast(device)):
            y = forward(self._ffn, self._x[some])
        return (y.float() - self._y[some]).square().sum(-1).mean() / self._unit

    @torch.no_grad()
    def _fit_bias(self) -> None:
        """Shift all logits of the router to reach the density on the recorded tokens."""
        if self._routing.select == "threshold":
            logits = torch.cat([self._router(x) for x in self._x.split(_AT_A_TIME)])
            self._router.bias.sub_(fit_cut([logits], "threshold", self._density) - float(self._routing.cut))

    @torch.no_grad()
    def _error(self) -> float:
        self._routing.mode = "hard"
        parts = (each.split(_AT_A_TIME) for each in (self._x, self._y, self._weights))
        total = sum(
            float(((forward(self._ffn, x) - y).square().sum(-1) * weights).sum())
            for x, y, weights in zip(*parts, strict=True)
        )
        return total / max(float((self._y.square().sum(-1) * self._weights).sum()), 1e-30)


def forward(ffn: FFNModules, x: Tensor) -> Tensor:
    """Outputs of an FFN, [..., d_model]."""
    y: Tensor = ffn.down(ffn.hidden(x, ACTIVATIONS[ffn.activation]))
    return y


@torch.no_grad()
def contributions(ffn: FFNModules, routing: Routing, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Dense outputs [n, d_model] of an FFN, and the weighted contribution of each group to them, [n, groups].

    Args:
        x: inputs, [n, d_model].
        weights: weights of the tokens, [n].
    """
    routing.mode = "dense"
    norms, outputs, added = rows(ffn.down).norm(dim=1), [], []
    hidden: list[Tensor] = []
    hook = ffn.down.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    try:
        for part in x.split(_AT_A_TIME):
            outputs.append(forward(ffn, part))
            added.append((hidden.pop() * norms).square().unflatten(-1, (-1, routing.group)).sum(-1))
    finally:
        hook.remove()
    return torch.cat(outputs), torch.cat(added) * weights[:, None]


def least(added: Tensor, density: float) -> Tensor:
    """The contribution that the share `density` of all contributions reaches."""
    count = max(1, round(density * added.numel()))
    return added.flatten().kthvalue(added.numel() - count + 1).values


def densities(
    ffns: Sequence[FFNModules], routing: Routing, recorded: Mapping[int, Recorded], density: float
) -> dict[int, float]:
    """Number of the FFN → its share of groups to compute: the groups with the largest contributions in all FFNs."""
    added = {}
    numbers = sum(len(recorded[ffn.layer].x) * ffn.d_ff // routing.group for ffn in ffns)
    step = -(-numbers // _NUMBERS)
    for ffn in ffns:
        x, weights = (torch.from_numpy(each[::step].copy()).to(rows(ffn.down).device) for each in recorded[ffn.layer])
        added[ffn.layer] = contributions(ffn, routing, x, weights)[1].cpu()
    bound = least(torch.cat([each.flatten() for each in added.values()]), density)
    return {layer: float((each >= bound).double().mean()) for layer, each in added.items()}
