"""The top-k of an FFN's activations in the forward pass of a torch model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.training.linears import rows


class SparseFFNs:
    """FFNs that pass only the activations of largest |h_j| ‖v_j‖ to their down projections.

    The chosen neurons are those that the pass `ffn-topk` wants: v_j is the row of W_down, and blocks are compared by
    their sums. All other activations and their gradients are zero, since the engine does not compute them.

    Args:
        downs: the down projections, whose inputs are [..., d_ff].
        block: neighbouring neurons that are chosen together; divides d_ff.

    Attributes:
        density: share of neurons kept for each token; 1 is the dense FFN.
    """

    def __init__(self, downs: Sequence[nn.Module], block: int = 1) -> None:
        self.density = 1.0
        self._block = block
        self._hooks = [down.register_forward_pre_hook(self._keep) for down in downs]

    def remove(self) -> None:
        """Make the FFNs dense again, for good."""
        for hook in self._hooks:
            hook.remove()

    def _keep(self, down: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor] | None:
        (h,) = inputs
        k = wanted(self.density, h.shape[-1] // self._block)
        if k * self._block >= h.shape[-1]:
            return None
        return (h * top_k(h.detach().abs() * row_norms(down), k, self._block).to(h.dtype),)


def wanted(density: float, blocks: int) -> int:
    """Number of an FFN's blocks that are kept, as in `ffn-topk`."""
    return max(1, round(density * blocks))


def top_k(scores: Tensor, k: int, block: int = 1) -> Tensor:
    """Whether each neuron belongs to the k blocks of largest sum, bool, for scores [..., d_ff] ≥ 0."""
    pooled = scores.unflatten(-1, (-1, block)).sum(-1)
    chosen = torch.zeros_like(pooled, dtype=torch.bool)
    chosen.scatter_(-1, pooled.topk(k, dim=-1, sorted=False).indices, True)
    return chosen.repeat_interleave(block, -1)


def row_norms(down: nn.Module) -> Tensor:
    """‖v_j‖ of each neuron, [d_ff], as the weights are now."""
    return rows(down).norm(dim=1)
