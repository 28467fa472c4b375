"""Prunes tokens layer by layer, by learned thresholds of the attention that they receive.

Kim et al. 2022 ("Learned token pruning for transformers", arXiv 2107.00910). The importance of a token in a layer is
the attention that it receives there, averaged over heads and queries; only tokens that entered the layer count, so
that neither padding nor tokens that left before change it. Attention of a layer sees the tokens that entered; its FFN
and all later layers see those that stay. The first token and the most important other one always stay, as the op
`KeepTokens` has it.

Within a layer, tokens that leave are hidden from attention and stay in memory. For those that stay that is the same as
if they were removed, since everything else in a layer is computed for each token by itself. Between two layers the rows
of a batch close up (`shrink`), so that learning gets cheaper, too.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

Mode = Literal["dense", "soft", "hard"]

_IMPLEMENTATION = "trimtab_pruned"
_FAR = -1e4  # added to logits of attention; its exponential is 0 in float32


class Pruning(nn.Module):
    """Thresholds of all layers, and the masks of the batch that is on its way through the model.

    Args:
        layers: of the model.
        mean_tokens: of a text. Settings are in units of 1 / mean_tokens, the mean of what a token receives.
        start: threshold behind the last layer at first; those before rise to it in a line from 0.
        sharpness: temperature of the soft mask.
        on_output: the soft mask multiplies the outputs of a layer, as in LTP; else it weighs keys of later layers, and
            becomes the hard mask as the temperature falls.

    Attributes:
        mode: "soft" is for training; at evaluation it counts as "hard".
        masks: [batch, tokens] for each layer passed so far: how much each token stays behind it, 0 to 1.
        reached: [batch, tokens] for each layer passed so far, of the soft mask: 1 for what the hard mask would keep.
        importances: of the tokens that entered each layer passed so far, [tokens of the batch]; not in training.
    """

    def __init__(self, layers: int, mean_tokens: float, start: float, sharpness: float, *, on_output: bool) -> None:
        super().__init__()
        self.multiples = nn.Parameter(start * torch.arange(1, layers + 1) / layers)
        self._unit, self._sharpness, self._on_output = 1 / mean_tokens, sharpness, on_output
        self.mode: Mode = "dense"
        self.masks: list[Tensor] = []
        self.reached: list[Tensor] = []
        self.importances: list[Tensor] = []

    @property
    def thresholds(self) -> Tensor:
        """[layers]: tokens stay whose importance reaches the threshold of the layer; all stay where it is 0 or less."""
        return self.multiples * self._unit

    def set_thresholds(self, thresholds: Tensor) -> None:
        """`thresholds` [layers], as the property has them."""
        self.multiples.data.copy_(thresholds / self._unit)

    def begin(self, mask: Tensor) -> None:
        """Begin with a batch.

        Args:
            mask: [batch, tokens], 1 for the texts' tokens and 0 for padding.
        """
        self._real = mask.to(torch.float32)
        self._log_stay = torch.zeros_like(self._real)
        self._stay = self._real
        self.masks, self.reached, self.importances = [], [], []

    def bias(self) -> Tensor:
        """What is added to the logits of attention, [batch, 1, 1, tokens]."""
        hidden = self._real if self._soft() else self._stay
        bias = torch.where(hidden > 0, self._log_stay.clamp_min(_FAR), _FAR)
        return bias[:, None, None, :]

    def pass_layer(self, weights: Tensor | None) -> None:
        """Let tokens leave behind the attention of the next layer.

        Args:
            weights: of attention, [batch, heads, queries, keys]; None where no token leaves.
        """
        if weights is not None:
            with torch.autocast(weights.device.type, enabled=False):
                self._leave(received(weights, self._stay), self.thresholds[len(self.masks)])
        self.masks.append(self._stay)

    @property
    def stay(self) -> Tensor:
        """[batch, tokens]: how much each token stays at this point of the way, 0 to 1."""
        return self._stay

    def shrink(self, states: Tensor) -> Tensor:
        """Between two layers, where tokens have left for good: `states` of those that stay, [batch, fewer, width].

        The sample that keeps most tokens says how many there are; others are padded.
        """
        max_staying = states.shape[1] if self.mode == "dense" or self._soft() else int(self._stay.sum(-1).max())
        if max_staying == states.shape[1]:
            return states
        places = self._stay.argsort(dim=-1, descending=True, stable=True)[:, :max_staying]
        self._stay = self._real = self._stay.gather(1, places)
        self._log_stay = torch.zeros_like(self._stay)
        return states.gather(1, places[..., None].expand(-1, -1, states.shape[2]))

    def weigh(self, output: Tensor) -> Tensor:
        """The output of a layer [batch, tokens, width], times the soft mask where it is on outputs."""
        if not (self._soft() and self._on_output):
            return output
        return output * self.masks[-1][..., None].to(output.dtype)

    def _soft(self) -> bool:
        return self.mode == "soft" and self.training

    def _leave(self, importance: Tensor, threshold: Tensor) -> None:
        always = stays_always(importance, self._stay)
        reach = (importance >= threshold) | always  # importance is never below 0
        if not self._soft():
            if not self.training:
                self.importances.append(importance[self._stay > 0])
            self._stay = self._stay * reach
            return
        self.reached.append((self.reached[-1] if self.reached else self._real) * reach)
        log_stay = functional.logsigmoid((importance - threshold) / (self._sharpness * self._unit))
        log_stay = torch.where(always, 0.0, log_stay)
        if self._on_output:  # each layer's mask stands for itself, and the next layer attends to all
            self._stay = self._real * log_stay.exp()
            return
        self._log_stay = self._log_stay + log_stay
        self._stay = self._real * self._log_stay.exp()


def received(weights: Tensor, entered: Tensor) -> Tensor:
    """Attention that each token receives, averaged over heads and the queries that entered, [batch, tokens].

    Args:
        weights: [batch, heads, queries, keys]; each row sums to 1 over the keys that entered.
        entered: [batch, tokens], how much each token entered, 0 to 1.
    """
    entered = entered.to(weights.dtype)
    total = torch.einsum("bhqk,bq->bk", weights, entered)
    return total / (weights.shape[1] * entered.sum(-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)


def stays_always(importance: Tensor, entered: Tensor) -> Tensor:
    """The first token, and the most important of the others that entered: bool [batch, tokens]."""
    others = torch.where(entered > 0, importance.detach(), -torch.inf)
    others[:, 0] = -torch.inf
    always = functional.one_hot(others.argmax(-1), importance.shape[1]).bool()
    always[:, 0] = True
    return always


def attach(model: Any, attentions: list[nn.Module], pruning: Pruning) -> None:
    """Let `attentions`, modules of a transformers model in the order of its layers, attend as `pruning` has it."""
    AttentionInterface.register(_IMPLEMENTATION, _attend)
    model.set_attn_implementation(_IMPLEMENTATION)
    for module in attentions:
        object.__setattr__(module, "_pruning", pruning)  # not as a submodule: its thresholds are none of the layer's


def detach(model: Any) -> None:
    """Let the model attend as transformers has it again."""
    model.set_attn_implementation("eager")


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **_: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention as transformers' interface has it: query, key and value are [batch, heads, tokens, width of a head].

    Its probabilities are not dropped out, which on a CPU doubles the time that long texts take.
    """
    pruning: Pruning = module._pruning  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if pruning.mode == "dense":
        pruning.pass_layer(None)
        bias = pruning.bias().to(query.dtype)
        context = functional.scaled_dot_product_attention(query, key, value, bias, scale=scale)
        return context.transpose(1, 2).contiguous(), None
    logits = query @ key.transpose(2, 3) * scale
    weights = (logits.to(torch.promote_types(logits.dtype, torch.float32)) + pruning.bias()).softmax(-1)
    pruning.pass_layer(weights)
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), weights
