"""How to fine-tune, apart from torch: the command line reads it too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How to fine-tune a model to its top-k neurons.

    Attributes:
        minutes: time limit; the learning rate and the density follow it.
        steps: follow a number of steps instead, with `minutes` as a mere end.
        lr: highest learning rate.
        batch_size: samples per step and process.
        max_tokens: of a block of text, or where the texts of a classifier are cut.
        ramp: share of the run over which the density falls from 1 to the one wanted, geometrically.
    """

    minutes: float = 10.0
    steps: int | None = None
    lr: float = 5e-4
    batch_size: int = 32
    max_tokens: int = 128
    weight_decay: float = 0.01
    seed: int = 0
    ramp: float = 0.5
