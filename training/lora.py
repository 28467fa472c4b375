"""Low-rank adapters of a model while it learns: weights stay as they are, and take in at the end what was learned."""

from __future__ import annotations

import warnings

from torch import nn
from transformers import PreTrainedModel

from trimtab.training.linears import linear_modules

RATE = 10.0
"""Learning rate of adapters, in that of whole weights, which fits them (thinkingmachines.ai/blog/lora)."""

LEARNS = "lora_"
"""Part of the names of parameters of adapters."""


class Adapters:
    """W + 2 B A in place of each W of `model`'s linear modules but its output embeddings; A and B alone learn.

    Args:
        rank: of B A.
    """

    def __init__(self, model: PreTrainedModel, rank: int) -> None:
        from peft import LoraConfig, get_peft_model

        self._model, linears = model, linear_modules(model)
        names = [
            name for name, module in model.named_modules()
            if any(module is each for each in linears) and module is not model.get_output_embeddings()
        ]  # fmt: skip
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, lora_dropout=0.0)
        with warnings.catch_warnings():  # that Conv1D keeps its weights transposed, which peft sees by itself
            warnings.simplefilter("ignore")
            self._peft = get_peft_model(model, config)  # changes `model` in place

    def around(self, linear: nn.Module) -> nn.Module:
        """The module that stands in for `linear`, or `linear` itself."""
        return next((each for each in self._model.modules() if getattr(each, "base_layer", None) is linear), linear)

    def merge(self) -> None:
        """Add to the weights what was learned; the model is as it was, with other values."""
        self._peft.merge_and_unload()
