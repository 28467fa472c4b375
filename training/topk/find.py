"""Which modules of a torch model are the down projections of its FFNs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn
from transformers.pytorch_utils import Conv1D

from trimtab.passes.anatomy import FFN
from trimtab.passes.errors import ModelError
from trimtab.training.topk.sparse import rows


def down_projections(model: nn.Module, ffns: Sequence[FFN]) -> list[nn.Module]:
    """The module of each FFN's down projection, told by its weights: an exported graph has names of its own.

    Args:
        model: the model that the graph was exported from.
        ffns: of the graph.

    Raises:
        ModelError: an FFN has none.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    found: list[nn.Module] = []
    for ffn in ffns:
        weight = ffn.down.w()
        module = next((m for m in linears if _same(m, weight)), None)
        if module is None:
            raise ModelError(
                f"{ffn.where}: no linear module of {type(model).__name__} holds its down projection",
                hint="leave it out with `layers` of ffn-topk",
            )
        found.append(module)
    return found


def _same(module: nn.Module, weight: np.ndarray) -> bool:
    """Whether the module multiplies with `weight`, [d_ff, d_model]."""
    theirs = rows(module)
    return tuple(theirs.shape) == weight.shape and np.array_equal(theirs.float().numpy(force=True), weight)
