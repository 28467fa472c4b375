"""Linear modules of a torch model: their weights as rows, and their match with a graph's projections."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trimtab.passes.anatomy import FFN
from trimtab.passes.errors import ModelError


class Projection(NamedTuple):
    """Outputs start .. stop - 1 of a linear module: all outputs, or one part if a module packs up and gate."""

    module: nn.Module
    start: int
    stop: int

    @property
    def weight(self) -> Tensor:
        """[inputs, outputs], a view."""
        return rows(self.module)[:, self.start : self.stop]

    @property
    def bias(self) -> Tensor | None:
        """[outputs], a view."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()[self.start : self.stop]


class FFNModules(NamedTuple):
    """The modules of one FFN: y = down(act(up(x))), or down(act(gate(x)) * up(x)).

    Attributes:
        layer: the FFN's number in the graph.
        where: the FFN's name in messages.
        activation: name of the activation, `Activation.name` of the graph's anatomy.
    """

    layer: int
    where: str
    up: Projection
    gate: Projection | None
    down: nn.Module
    activation: str

    @property
    def d_ff(self) -> int:
        return int(rows(self.down).shape[0])

    @property
    def d_model(self) -> int:
        return int(rows(self.up.module).shape[0])

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Name → module: up, gate if it has one of its own, down."""
        named = {"up": self.up.module, "down": self.down}
        if self.gate is not None and self.gate.module is not self.up.module:
            named["gate"] = self.gate.module
        return named

    def hidden(self, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        """Input of the down projection, [..., d_ff], for x [..., d_model]."""
        packed: Tensor = self.up.module(x)
        up = packed[..., self.up.start : self.up.stop]
        if self.gate is None:
            return act(up)
        if self.gate.module is not self.up.module:
            packed = self.gate.module(x)
        return act(packed[..., self.gate.start : self.gate.stop]) * up


def rows(linear: nn.Module) -> Tensor:
    """Weights of a linear module, one row per input, [inputs, outputs]; transformers' Conv1D keeps them so."""
    weight = linear.get_parameter("weight").detach()
    return weight.T if isinstance(linear, nn.Linear) else weight


def linear_modules(model: nn.Module) -> list[nn.Module]:
    """All linear modules of `model`, in its order."""
    return [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]


def find_linear(linears: Iterable[nn.Module], weight: np.ndarray) -> nn.Module | None:
    """The first of `linears` with `weight` [inputs, outputs]. Names cannot match: graphs have other names."""
    whole = (module for module in linears if tuple(rows(module).shape) == weight.shape)
    return next((module for module in whole if _part(module, weight) is not None), None)


def find_ffns(model: nn.Module, ffns: Sequence[FFN]) -> list[FFNModules]:
    """The modules of each FFN. No two FFNs share a module.

    Args:
        model: the model that the graph was exported from.
        ffns: the FFNs of the graph.

    Raises:
        ModelError: an FFN has no modules, or shares them with another FFN.
    """
    linears, taken = linear_modules(model), set[tuple[int, int]]()

    def find(ffn: FFN, weight: np.ndarray) -> Projection:
        matches = [match for module in linears if (match := _part(module, weight)) is not None]
        match = next((each for each in matches if (id(each.module), each.start) not in taken), None)
        if match is None:
            raise ModelError(
                f"{ffn.where}: its projections are those of another FFN, too"
                if matches
                else f"{ffn.where}: no linear module of {type(model).__name__} holds its projections",
                hint="routers and groups are of one FFN; give a model whose layers have weights of their own"
                if matches
                else "give a model that is exported as it is",
            )
        taken.add((id(match.module), match.start))
        return match

    return [
        FFNModules(
            ffn.layer, ffn.where, find(ffn, ffn.up.w()), None if ffn.gate is None else find(ffn, ffn.gate.w()),
            find(ffn, ffn.down.w()).module, ffn.activation.name,
        )
        for ffn in ffns
    ]  # fmt: skip


def permute_neurons(ffn: FFNModules, order: np.ndarray) -> None:
    """Put the neurons of an FFN into another order, in place. The FFN computes the same.

    Args:
        order: numbers of the neurons, [d_ff].
    """
    index = torch.from_numpy(np.ascontiguousarray(order))
    with torch.no_grad():
        for projection in (ffn.up, ffn.gate):
            if projection is not None:
                projection.weight.copy_(projection.weight[:, index])
                if projection.bias is not None:
                    projection.bias.copy_(projection.bias[index])
        rows(ffn.down).copy_(rows(ffn.down)[index])


def _part(module: nn.Module, weight: np.ndarray) -> Projection | None:
    """The outputs of `module` with the weights `weight` [inputs, outputs]: all outputs, or a part of that width."""
    theirs, width = rows(module), weight.shape[1]
    if theirs.shape[0] != weight.shape[0] or theirs.shape[1] % width:
        return None
    for start in range(0, theirs.shape[1], width):
        part = theirs[:, start : start + width]
        if np.array_equal(_numbers(part[:1]), weight[:1]) and np.array_equal(_numbers(part), weight):
            return Projection(module, start, start + width)
    return None


def _numbers(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.float().numpy(force=True)
    return array
