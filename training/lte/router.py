"""What scores the groups of one FFN's neurons while a model learns; as `trimtab.passes.ffn_route` computes it."""

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

_START = 2.0  # logit of every score at first, 0.88: all groups are on, and sigmoid still has a slope there
_LEAST = 1e-12  # of a contribution, so that its logarithm is finite


class Router(nn.Module, ABC):
    """Logits of the scores of an FFN's groups."""

    bias: nn.Parameter

    @property
    def groups(self) -> int:
        return len(self.bias)

    @abstractmethod
    def tensors(self, cut: float) -> dict[str, np.ndarray]:
        """As the pass `ffn-route` reads them, of inputs as they are; `cut` is what logits have to reach."""

    def rate(self, lr: float) -> float:
        """Of its parameters in the soft stage: so that a step of Adam moves the logits of any router alike."""
        return lr

    @abstractmethod
    def restore(self, learned: Mapping[str, np.ndarray]) -> None:
        """Become what `tensors` has written, with a cut of 0."""


class LinearRouter(Router):
    """A linear layer on standardised inputs.

    Standardised, one learning rate fits all models: a step of Adam moves logits by about lr · √d_model.
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
        """Take inputs of this mean and standard deviation, [d_model] each; features that are constant count for 0."""
        usual = deviation.mean()
        scale = torch.where(deviation > 1e-4 * usual, 1 / deviation, torch.zeros_like(deviation))
        self.mean.copy_(mean)
        self.scale.copy_(scale * len(mean) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., groups], float32, of x [..., d_model]; an engine computes them in float32, too."""
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
    """log of what a group is guessed to add, Σ |ĥ| · ‖row of W_down‖ by int4 copies of up and gate, and a bias.

    The copies are those of the weights as they are: what these learn, the router follows. Until a density is fitted the
    scores mean nothing.
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

        Guesses are in the precision of autocast, where that is on: they are rounded to int4 anyway.
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
    """The outputs of a projection by its int4 copy."""
    weight, bias = projection.weight.T, projection.bias
    block = fit_block(BLOCK, weight.shape[1])
    return functional.linear(x, (weight if block is None else rounded_blocks(weight, block)).to(x.dtype), bias)
