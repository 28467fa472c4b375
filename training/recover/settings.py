"""Settings of distillation. The command line reads them, so this module does not import torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trimtab.training.contract import Settings as Common


class Settings(Common):
    """Settings for distilling a rewritten model from its dense original."""

    train: Literal["all", "ffn"] = Field(
        "all", description="Weights to train: all but embeddings, or those of the FFNs alone."
    )
    temperature: float = Field(1.0, gt=0, description="Temperature of the softmax when logits are compared.")
    states_weight: float = Field(
        1.0, ge=0, description="Weight of the layers' outputs in the loss; the model's outputs have 1."
    )
    labels_weight: float = Field(
        0.0, ge=0, description="Weight of the data's labels in the loss; the dense model's outputs have 1."
    )
