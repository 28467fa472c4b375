"""Finds the modules of a torch model that are the down projections of its FFNs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from trimtab.passes.anatomy import FFN
from trimtab.passes.errors import ModelError
from trimtab.training.linears import find_linear, linear_modules


def down_projections(model: nn.Module, ffns: Sequence[FFN]) -> list[nn.Module]:
    """The module of each FFN's down projection, identified by its weights, as exported graphs have other names.

    Args:
        model: the model that the graph was exported from.
        ffns: the FFNs of the graph.

    Raises:
        ModelError: no module has the weights of an FFN's down projection.
    """
    linears = linear_modules(model)
    modules: list[nn.Module] = []
    for ffn in ffns:
        module = find_linear(linears, ffn.down.w())
        if module is None:
            raise ModelError(
                f"{ffn.where}: no linear module of {type(model).__name__} holds its down projection",
                hint="leave it out with `layers` of ffn-topk",
            )
        modules.append(module)
    return modules
