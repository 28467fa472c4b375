"""Settings of fine-tuning. The command line reads them, so this module does not import torch."""

from __future__ import annotations

from pydantic import Field

from trimtab.training.contract import Settings as Common


class Settings(Common):
    """How to fine-tune a model to its top-k neurons."""

    lr: float = Field(5e-4, ge=0, description="Highest learning rate.")
    ramp: float = Field(
        0.5, ge=0, le=1, description="Share of the run over which the density falls from 1, by equal factors."
    )
