"""Settings of a pyramid's training. The command line reads them, so this module does not import torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from trimtab.training.contract import Settings as Common

METHOD = "magic-pyramid"

STAGES = ("fine_tune", "soft", "hard", "exits")
"""In the order they run. Each is a share of the run, and is left out at 0."""


class Settings(Common):
    """How to train the four stages of Magic Pyramid (arXiv 2111.00230)."""

    fine_tune: float | None = Field(
        None, ge=0, description="Share of the run that fine-tunes the dense model; by default 0, and 3 for a model "
        "that gets a new classification head.",
    )  # fmt: skip
    soft: float = Field(1.0, ge=0, description="Share of the run that learns thresholds or routers, with soft masks.")
    hard: float = Field(2.0, ge=0, description="Share of the run that tunes the weights, with hard masks.")
    exits: float = Field(
        1.0, ge=0, description="Share of the run that distils exits from the final classifier, the model frozen."
    )
    start: float = Field(
        0.5, ge=0, description="Initial threshold of the last layer, in multiples of the mean attention that a token "
        "of a text of mean length receives; earlier layers have a linear share of it.",
    )  # fmt: skip
    sharpness: float = Field(0.1, gt=0, description="Temperature of the soft mask, in the unit of --start.")
    threshold_lr: float = Field(
        0.01, ge=0, description="Highest learning rate of the thresholds, in the unit of --start."
    )
    pressure: float = Field(0.5, ge=0, description="Weight, in the loss, of the share of tokens that are kept.")
    keep: float = Field(
        0.0, ge=0, le=1, description="Share of tokens, over all layers, below which --pressure has no effect. With "
        "--soft 0, thresholds are the quantiles of the training texts that keep this share.",
    )  # fmt: skip
    mask: Literal["attention", "output"] = Field(
        "attention", description="Tensor that the soft mask multiplies: the attention that later layers pay to a "
        "token, or the output of its layer (as in LTP).",
    )  # fmt: skip
    distil: float = Field(
        0.5, ge=0, le=1, description="Weight of the dense model's answers in the loss of the stages soft and hard; "
        "the labels have the rest.",
    )  # fmt: skip
    joint: float = Field(
        3.0, ge=0, description="Weight of the exits' mean loss in the stages soft and hard, where layers learn to "
        "serve their exits; 0, as in the paper: exits learn after the model is frozen.",
    )  # fmt: skip
    entrance: bool = Field(True, description="Add an exit before the first layer, which reads the embeddings alone.")
    head: Literal["light", "first", "fastbert"] = Field(
        "light", description="Input of an exit: the first token and the mean (light), the first token, or all tokens "
        "by attention (fastbert).",
    )  # fmt: skip
    head_width: int = Field(128, ge=2, multiple_of=2, description="Hidden width of an exit.")
    exit_lr: float = Field(1e-3, ge=0, description="Highest learning rate of the exits.")

    @model_validator(mode="after")
    def _in_order(self) -> Settings:
        if not (self.fine_tune or self.soft or self.hard or self.exits):
            raise ValueError("soft, hard and exits are 0: no stage is left to run")
        return self

    def shares(self, new_head: bool) -> dict[str, float]:
        """Stage → its share of the run, of those that run; they add up to 1.

        Args:
            new_head: the model has a classification head that nothing has trained.
        """
        given: dict[str, Any] = {name: getattr(self, name) for name in STAGES}
        if given["fine_tune"] is None:
            given["fine_tune"] = 3.0 if new_head else 0.0
        total = sum(given.values())
        return {name: share / total for name, share in given.items() if share}

    @property
    def takes_quantiles(self) -> bool:
        """Whether thresholds are quantiles, which nothing has to learn."""
        return not self.soft and 0 < self.keep < 1

    @property
    def makes_thresholds(self) -> bool:
        """Whether the run finds thresholds, and does not only take those that the model has."""
        return self.soft > 0 or self.takes_quantiles

    @property
    def learns_jointly(self) -> bool:
        """Whether exits learn together with the model."""
        return self.joint > 0 and self.exits > 0
