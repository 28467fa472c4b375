"""Low-rank adapters for training: the weights are frozen, and the adapters are merged into them at the end."""

from __future__ import annotations

import warnings

from torch import nn
from transformers import PreTrainedModel

from trimtab.training.linears import linear_modules

RATE = 10.0
"""Learning rate of adapters, as a multiple of the rate for whole weights (thinkingmachines.ai/blog/lora)."""

LEARNS = "lora_"
"""Part of the names of adapters' parameters."""


class Adapters:
    """Replaces each W of `model`'s linear modules, except output embeddings, by W + 2 B A. Only A and B learn.

    Args:
        rank: rank of B A.
    """

    def __init__(self, model: PreTrainedModel, rank: int) -> None:
        from peft import LoraConfig, get_peft_model

        self._model, linears = model, linear_modules(model)
        names = [
            name for name, module in model.named_modules()
            if any(module is each for each in linears) and module is not model.get_output_embeddings()
        ]  # fmt: skip
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, lora_dropout=0.0)
        with warnings.catch_warnings():  # peft warns that Conv1D stores its weights transposed, and handles it
            warnings.simplefilter("ignore")
            self._peft = get_peft_model(model, config)  # changes `model` in place

    def around(self, linear: nn.Module) -> nn.Module:
        """The module that replaces `linear`, or `linear` itself."""
        return next((each for each in self._model.modules() if getattr(each, "base_layer", None) is linear), linear)

    def merge(self) -> None:
        """Merge the adapters into the weights; the model has its original modules again."""
        self._peft.merge_and_unload()
