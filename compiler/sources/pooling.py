"""Sentence embeddings from token states, as sentence-transformers computes them, inside the graph."""

from __future__ import annotations

import torch


class Pooling(torch.nn.Module):
    """Token states [batch, tokens, d] and mask [batch, tokens] → embeddings [batch, d].

    Args:
        mode: "mean" over the unmasked tokens, or "cls", the first token.
        normalize: divide by the L2 norm.
    """

    def __init__(self, mode: str, normalize: bool) -> None:
        super().__init__()
        self.mode = mode
        self.normalize = normalize

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self.mode == "cls":
            pooled = states[:, 0]
        else:
            weight = mask.unsqueeze(-1).to(states.dtype)
            pooled = (states * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(pooled, dim=1) if self.normalize else pooled
