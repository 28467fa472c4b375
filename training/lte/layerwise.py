"""Each FFN learns by itself, from recorded inputs, to give its own dense outputs with some groups of neurons alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trimtab.training.clock import Clock, schedule
from trimtab.training.device import bfloat16_is_fast
from trimtab.training.linears import FFNModules, rows
from trimtab.training.lte.control import fit_cut
from trimtab.training.lte.routers import Router, Routing
from trimtab.training.lte.settings import Settings

_ROUTERS = 0.2  # share of an FFN's time in which its router learns, before its weights do
_ROWS = 512  # tokens per step
_AT_A_TIME = 4096  # tokens that the dense FFN computes together
_RIDGE = 0.01  # of the inputs' mean variance
_RARE = 0.01  # share of the tokens that need a group, and that do not, at the least: logits stay finite

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
    "relu": functional.relu,
    "relu_squared": lambda x: functional.relu(x).square(),
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
"""Names of `Activation` in the graph's anatomy → what they compute."""


class LayerFit:
    """The training of one FFN.

    Args:
        x: recorded inputs, [n, d_model].
        routing: of the whole model; its hooks mask the FFN's activations.
    """

    def __init__(self, ffn: FFNModules, routing: Routing, x: Tensor, settings: Settings) -> None:
        self._ffn, self._routing, self._settings, self._x = ffn, routing, settings, x
        self._act = ACTIVATIONS[ffn.activation]
        router = routing.routers[str(ffn.layer)]
        assert isinstance(router, Router)
        self._router = router
        self._density = 1 - settings.sparsity
        self._y, self._needed = self._dense()
        self._unit = self._y.square().sum(-1).mean().clamp_min(1e-12)
        self._begin()

    def run(self, clock: Clock, generator: torch.Generator, progress: Callable[[float], None]) -> tuple[int, float]:
        """Train until the clock says that the time is over.

        Returns:
            steps, and the relative error ‖y - dense‖² / ‖dense‖² over the recorded tokens.
        """
        weights = [parameter for module in self._ffn.modules.values() for parameter in module.parameters()]
        routers = list(self._router.parameters())
        phases: list[tuple[float, float, list[Any], float, Callable[[Tensor], Tensor]]] = [
            (0.0, _ROUTERS, routers, self._settings.router_lr, self._router_loss),
            (_ROUTERS, 1.0, weights, self._settings.layer_lr, self._weights_loss),
        ]
        step = 0
        for begin, end, parameters, rate, loss_of in phases:
            for parameter in (*weights, *routers):
                parameter.requires_grad_(any(parameter is each for each in parameters))
            optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
            while (at := clock.at(step)) < end:
                for group in optimizer.param_groups:
                    group["lr"] = rate * schedule((at - begin) / (end - begin))
                some = torch.randint(len(self._x), (min(_ROWS, len(self._x)),), generator=generator).to(self._x.device)
                optimizer.zero_grad()
                loss_of(some).backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                step += 1
                progress(min(at, 1.0))
            self._fit_bias()
        return step, self._error()

    def _forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._ffn.down(self._ffn.hidden(x, self._act))
        return y

    @torch.no_grad()
    def _dense(self) -> tuple[Tensor, Tensor]:
        """Outputs [n, d_model], and which groups are needed, bool [n, groups]: those that add most to the output."""
        self._routing.mode = "dense"
        norms, outputs, added = rows(self._ffn.down).norm(dim=1), [], []
        hidden: list[Tensor] = []
        hook = self._ffn.down.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
        try:
            for x in self._x.split(_AT_A_TIME):
                outputs.append(self._forward(x))
                parts = (hidden.pop() * norms).square().unflatten(-1, (-1, self._routing.group)).sum(-1)
                added.append(parts)
        finally:
            hook.remove()
        of_groups = torch.cat(added)
        count = max(1, round(self._density * of_groups.numel()))
        least = of_groups.flatten().kthvalue(of_groups.numel() - count + 1).values
        return torch.cat(outputs), (of_groups >= least) & (of_groups > 0)

    @torch.no_grad()
    def _begin(self) -> None:
        """Fit the router in closed form, so that even one that no step follows tells groups apart.

        Least squares of p(needed | x), around the share p of tokens that need the group; its logit to first order.
        """
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
            y = self._forward(self._x[some])
        return (y.float() - self._y[some]).square().sum(-1).mean() / self._unit

    @torch.no_grad()
    def _fit_bias(self) -> None:
        """Move all logits of the router so that the density is reached on the recorded tokens."""
        if self._routing.select == "threshold":
            logits = torch.cat([self._router(x) for x in self._x.split(_AT_A_TIME)])
            self._router.bias.sub_(fit_cut([logits], "threshold", self._density) - float(self._routing.cut))

    @torch.no_grad()
    def _error(self) -> float:
        self._routing.mode = "hard"
        parts = zip(self._x.split(_AT_A_TIME), self._y.split(_AT_A_TIME), strict=True)
        total = sum(float((self._forward(x) - y).square().sum()) for x, y in parts)
        return total / max(float(self._y.square().sum()), 1e-12)
