"""Exits: small classifiers after the layers, each of which answers the samples that it is sure of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_HEADS = 2


class Exit(nn.Module):
    """LayerNorm, Linear, tanh, Linear on the first token, or on the first token beside the mean of all that stay.

    Args:
        width: of the model.
        hidden: width of the exit.
        classes: number of classes.
        mean: read the mean, too.
    """

    def __init__(self, width: int, hidden: int, classes: int, *, mean: bool) -> None:
        super().__init__()
        self._mean = mean
        inputs = 2 * width if mean else width
        self.norm = nn.LayerNorm(inputs)
        self.dense = nn.Linear(inputs, hidden)
        self.out = nn.Linear(hidden, classes)

    def forward(self, states: Tensor, stay: Tensor) -> Tensor:
        """Logits [batch, classes].

        Args:
            states: behind a layer, [batch, tokens, width].
            stay: [batch, tokens], 0 for tokens that are not there.
        """
        x = states[:, 0]
        if self._mean:
            weight = stay.to(states.dtype)[..., None]
            x = torch.cat([x, (states * weight).sum(1) / weight.sum(1)], -1)
        logits: Tensor = self.out(torch.tanh(self.dense(self.norm(x))))
        return logits


class FastBERTExit(nn.Module):
    """The exit of Liu et al. 2020 ("FastBERT", arXiv 2004.02178): attention of two heads in a narrow space.

    Only the first token's row of that attention is read, so only it is computed.
    """

    def __init__(self, width: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(width, hidden)
        self.query, self.key, self.value, self.attended = (nn.Linear(hidden, hidden) for _ in range(4))
        self.dense = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, classes)

    def forward(self, states: Tensor, stay: Tensor) -> Tensor:
        """As `Exit.forward`."""
        x = torch.tanh(self.narrow(states))
        q, k, v = self.query(x[:, :1]), self.key(x), self.value(x)
        q, k, v = (t.unflatten(-1, (_HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        logits = logits.masked_fill(stay[:, None, None, :] == 0, -torch.inf)
        first = (logits.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)[:, 0]
        out: Tensor = self.out(torch.tanh(self.dense(self.attended(first))))
        return out


def make_exit(kind: str, width: int, hidden: int, classes: int) -> nn.Module:
    """An exit of `kind`: "light", "first" or "fastbert"."""
    if kind == "fastbert":
        return FastBERTExit(width, hidden, classes)
    return Exit(width, hidden, classes, mean=kind == "light")
