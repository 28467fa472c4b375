"""Modules that compute sentence embeddings from token states inside the graph, as sentence-transformers does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trimtab.passes.errors import ModelError

_ACTIVATIONS = (
    "CELU", "ELU", "GELU", "Hardsigmoid", "Hardswish", "Hardtanh", "Identity", "LeakyReLU", "LogSigmoid", "Mish",
    "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus", "Softsign", "Tanh", "Tanhshrink",
)  # fmt: skip
"""Activations of torch.nn that a Dense module may have: elementwise, and constructed without arguments."""


class Pooling(nn.Module):
    """Token states [batch, tokens, d] and mask [batch, tokens] → embeddings [batch, len(modes) · d].

    Padding may be on either side.

    Args:
        modes: "cls" (the first token), "lasttoken", "mean", "mean_sqrt_len_tokens" (the sum over the root of the
            count), "weightedmean" (weighted by the token's number, from 1) or "max"; several are concatenated.
        skip: number of tokens at the beginning of each row that are not pooled.
    """

    def __init__(self, modes: Sequence[str], skip: int = 0) -> None:
        super().__init__()
        self.modes = tuple(modes)
        self.skip = skip

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        tokens = mask.shape[1]
        places = torch.arange(tokens, device=mask.device)  # integers, which stay exact in half precision
        number = places - _first(mask, places, tokens)  # number of each token in its text, from 0
        kept = mask * (number >= self.skip) if self.skip else mask
        pooled = [self._pool(mode, states, kept, places, number) for mode in self.modes]
        return torch.cat(pooled, -1) if len(pooled) > 1 else pooled[0]

    def _pool(self, mode: str, states: Tensor, mask: Tensor, places: Tensor, number: Tensor) -> Tensor:
        if mode == "max":
            lowest = torch.finfo(states.dtype).min  # finite, so that a row without tokens stays finite
            return states.masked_fill(mask.unsqueeze(-1) == 0, lowest).amax(1)
        tokens = mask.shape[1]
        if mode == "cls":
            first = _first(mask, places, tokens)
            return _select(states, places == first * (first < tokens))  # place 0 in a row without tokens
        if mode == "lasttoken":
            return _select(states, (places == (mask * places).amax(1, keepdim=True)) & (mask != 0))
        weight = mask.to(states.dtype)
        if mode == "weightedmean":
            weight = weight * ((number + 1).to(states.dtype) / tokens)
        count = weight.sum(1, keepdim=True).clamp(min=1e-9)
        return (states * weight.unsqueeze(-1)).sum(1) / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)


def _first(mask: Tensor, places: Tensor, tokens: int) -> Tensor:
    """Place of the first token of each row, [batch, 1]; `tokens` for a row without tokens."""
    return tokens - (mask * (tokens - places)).amax(1, keepdim=True)


def _select(states: Tensor, selected: Tensor) -> Tensor:
    """The state of the one token per row that `selected`, [batch, tokens], marks."""
    return (states * selected.to(states.dtype).unsqueeze(-1)).sum(1)


class Dense(nn.Module):
    """A linear map with an activation, and a residual connection if the configuration has use_residual."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        wide, out = int(config["in_features"]), int(config["out_features"])
        self.linear = nn.Linear(wide, out, bias=bool(config.get("bias", True)))
        self.activation = _activation(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
        self.use_residual = bool(config.get("use_residual", False))
        if self.use_residual and wide != out:
            self.residual = nn.Linear(wide, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.linear(x))
        if not self.use_residual:
            return y
        return y + (self.residual(x) if hasattr(self, "residual") else x)


class LayerNorm(nn.Module):
    """torch's LayerNorm, with sentence-transformers' names of the weights."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(int(config["dimension"]))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y


class Normalize(nn.Module):
    """Division by the L2 norm."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1)


class Embedding(nn.Module):
    """Token states [batch, tokens, d] and mask [batch, tokens] → sentence embeddings [batch, width].

    Args:
        pooling: the first step.
        layers: the steps behind the pooling.
        width: number of leading dimensions of the embedding that are kept; None keeps all.
    """

    def __init__(self, pooling: Pooling, layers: Sequence[nn.Module] = (), width: int | None = None) -> None:
        super().__init__()
        self.pooling = pooling
        self.layers = nn.ModuleList(layers)
        self.width = width

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        x: Tensor = self.pooling(states, mask)
        for layer in self.layers:
            x = layer(x)
        return x if self.width is None else x[:, : self.width]


def load_embedding(folder: Path, config: dict[str, Any]) -> Embedding:
    """Load the modules behind the transformer from the sentence-transformers folder `folder`.

    Args:
        config: the fields of a `SentenceConfig`.

    Raises:
        ModelError: a module's configuration and weights do not fit.
    """
    layers = [_layer(folder / path, kind, options) for kind, path, options in config["layers"]]
    return Embedding(Pooling(config["modes"], config["skip"]), layers, config["width"]).eval()


def _layer(folder: Path, kind: str, config: dict[str, Any]) -> nn.Module:
    if kind == "Normalize":
        return Normalize()
    try:
        module: nn.Module = Dense(config) if kind == "Dense" else LayerNorm(config)
        module.load_state_dict(_weights(folder))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{folder}: the {kind} module and its weights do not fit ({reason})", hint="download or save it again"
        ) from error
    return module


def _weights(folder: Path) -> dict[str, Tensor]:
    safe = folder / "model.safetensors"
    loaded: dict[str, Tensor] = (
        load_file(safe) if safe.is_file() else torch.load(folder / "pytorch_model.bin", weights_only=True)
    )
    return {name: weight.float() for name, weight in loaded.items()}


def _activation(path: str | None) -> nn.Module:
    module, _, name = (path or "torch.nn.modules.linear.Identity").rpartition(".")
    if not module.startswith("torch.nn") or name not in _ACTIVATIONS:
        raise ModelError(
            f"Dense with the activation {path} is not supported", hint=f"supported: {', '.join(_ACTIVATIONS)}"
        )
    activation: nn.Module = getattr(nn, name)()
    return activation
