"""Routers in training, which score the groups of one FFN's neurons like `trimtab.passes.ffn_route`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from trimtab.passes.ffn_route.copy_router import BLOCK
from trimtab.passes.matrices.quantize import fit_block
from trimtab.training.activations import ACTIVATIONS
from trimtab.training.linears import FFNModules, Projection, rows
from trimtab.training.rounding import rounded_blocks

_START = 2.0  # initial logit; the score is 0.88: all groups are on, and the sigmoid still has a slope
_LEAST = 1e-12  # lower bound of a contribution, so that its logarithm is finite


class Router(nn.Module, ABC):
    """Logits of the scores of an FFN's groups."""

    bias: nn.Parameter

    @property
    def groups(self) -> int:
        return len(self.bias)

    @abstractmethod
    def tensors(self, cut: float) -> dict[str, np.ndarray]:
        """The tensors that the pass `ffn-route` reads, for inputs that are not standardised.

        Args:
            cut: logit from which on a group is computed.
        """

    def rate(self, lr: float) -> float:
        """Learning rate of the router in the soft stage: a step of Adam moves the logits of all routers equally."""
        return lr

    @abstractmethod
    def restore(self, learned: Mapping[str, np.ndarray]) -> None:
        """Load tensors written by `tensors`, with a cut of 0."""


class LinearRouter(Router):
    """A linear layer on standardised inputs.

    With standardised inputs, one learning rate suits all models: a step of Adam moves logits by about lr · √d_model.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, d_model: int, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(groups, d_model))
        self.bias = nn.Parameter(torch.full((groups,), _START))
        self.register_buffer("mean", torch.zeros(d_model))
        self.register_buffer("scale", torch.full((d_model,), d_model**-0.5))

    def standardise(self, mean: Tensor, deviation: Tensor) -> None:
        """Set the inputs' mean and standard deviation, [d_model] each. Constant features are ignored."""
        usual = deviation.mean()
        scale = torch.where(deviation > 1e-4 * usual, 1 / deviation, torch.zeros_like(deviation))
        self.mean.copy_(mean)
        self.scale.copy_(scale * len(mean) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., groups] for x [..., d_model], in float32 like in an engine."""
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear((x.float() - self.mean) * self.scale, self.weight, self.bias)

    def tensors(self, cut: float) -> dict[str, np.ndarray]:
        weight = (self.weight.detach() * self.scale).double()
        bias = self.bias.detach().double() - weight @ self.mean.double()
        named = {"weight": weight.float().numpy(force=True), "bias": bias.float().numpy(force=True)}
        return named | {"bias": named["bias"] - np.float32(cut)}

    def restore(self, learned: Mapping[str, np.ndarray]) -> None:
        self.scale.fill_(1.0)
        self.weight.data.copy_(torch.from_numpy(learned["weight"]))
        self.bias.data.copy_(torch.from_numpy(learned["bias"]))


class CopyRouter(Router):
    """Logit = log of a group's estimated contribution, Σ |ĥ| · ‖row of W_down‖ with int4 copies of up and gate, + bias.

    The copies are those of the current weights, so the router follows their training. The scores are meaningless until
    a density is fitted.
    """

    sizes: Tensor | None

    def __init__(self, ffn: FFNModules, group: int) -> None:
        super().__init__()
        self.group = group
        self.bias = nn.Parameter(torch.zeros(ffn.d_ff // group))
        self.register_buffer("sizes", None)  # of a router that was learned before, instead of norms and bias
        self._ffn = [ffn]  # in a list: its modules are the model's, and no part of what is saved here

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., groups] of x [..., d_model]; only the bias has a gradient.

        Estimates use the precision of autocast, if it is on, as the weights are rounded to int4 anyway.
        """
        (ffn,) = self._ffn
        with torch.no_grad():
            up = _guess(ffn.up, x)
            act = ACTIVATIONS[ffn.activation]
            h = act(up) if ffn.gate is None else act(_guess(ffn.gate, x)) * up
            added = (h.float().abs().unflatten(-1, (-1, self.group)) * self._sizes()).sum(-1)
            guessed = added.add_(_LEAST).log_()
        return guessed + self.bias

    def _sizes(self) -> Tensor:
        if self.sizes is not None:
            return self.sizes
        return rows(self._ffn[0].down).norm(dim=1).float().unflatten(0, (-1, self.group))

    def rate(self, lr: float) -> float:
        return lr * self._ffn[0].d_model ** 0.5

    def tensors(self, cut: float) -> dict[str, np.ndarray]:
        unit = (self.bias.detach() - cut).double().exp()
        return {"sizes": (self._sizes() * unit[:, None]).float().numpy(force=True)}

    def restore(self, learned: Mapping[str, np.ndarray]) -> None:
        self.sizes = torch.from_numpy(learned["sizes"]).to(self.bias.device)
        self.bias.data.zero_()


def _guess(projection: Projection, x: Tensor) -> Tensor:
    """The outputs of a projection, computed with its int4 copy."""
    weight, bias = projection.weight.T, projection.bias
    block = fit_block(BLOCK, weight.shape[1])
    return functional.linear(x, (weight if block is None else rounded_blocks(weight, block)).to(x.dtype), bias)
