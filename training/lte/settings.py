"""Settings of router training. The command line reads them, so this module does not import torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trimtab.training.contract import Settings as Common
from trimtab.training.magic_pyramid.settings import Settings as Pyramid

STAGES = ("fine_tune", "layerwise", "soft", "hard")
"""In the order they run. Each is a share of the run, and is left out at 0."""

_SHARED = {name: Pyramid.model_fields[name].description for name in ("fine_tune", "soft", "hard", "distil")}


class Settings(Common):
    """Settings of LTE's stages (arXiv 2402.06126), and of the stage before them, which fits each FFN separately."""

    sparsity: float = Field(
        0.5, ge=0, lt=1, description="Share of the FFNs' neurons that are left out, over all layers and tokens."
    )
    group: int = Field(32, ge=1, description="Neurons per group; a divisor of the width of the FFNs.")
    group_by: Literal["need", "weights"] = Field(
        "need", description="Neurons of one group: those that the same tokens need, or of similar weights (the paper).",
    )  # fmt: skip
    router: Literal["linear", "copy"] = Field(
        "linear", description="Router: a linear layer on the FFN's input, as in the paper; or int4 copies of up and "
        "gate, which estimate what each neuron adds.",
    )  # fmt: skip
    select: Literal["threshold", "cumulative"] = Field(
        "threshold", description="Groups to compute: those whose score is 0.5 or more, or the best ones up to a share "
        "of the sum of all scores.",
    )  # fmt: skip
    masks: Literal["straight", "scores"] = Field(
        "straight", description="Masks of the stage soft: hard ones with straight-through gradients, or the scores."
    )
    fine_tune: float | None = Field(None, ge=0, description=_SHARED["fine_tune"])
    layerwise: float = Field(
        1.0, ge=0, description="Share of the run that fits routers and weights of each FFN to its dense outputs."
    )
    soft: float = Field(2.0, ge=0, description=_SHARED["soft"])
    hard: float = Field(1.0, ge=0, description=_SHARED["hard"])
    efficiency: float = Field(
        0.1, gt=0, description="Initial weight of the scores' mean square in the loss; training then adapts it to "
        "reach the sparsity.",
    )  # fmt: skip
    separability: float = Field(
        0.5, ge=0, description="With --masks scores: final weight of the loss that keeps scores away from the "
        "threshold.",
    )  # fmt: skip
    router_lr: float = Field(1e-3, ge=0, description="Highest learning rate of the routers in the stage soft.")
    layer_lr: float = Field(5e-4, ge=0, description="Highest learning rate of the weights in the stage layerwise.")
    layer_tokens: int = Field(
        16384, ge=64, description="Number of tokens whose FFN inputs the stage layerwise learns from."
    )
    lora_rank: int = Field(
        0, ge=0, description="Rank of LoRA adapters, trained instead of weights in all stages but layerwise; 0: none."
    )
    distil: float = Field(0.5, ge=0, le=1, description=_SHARED["distil"])

    @model_validator(mode="after")
    def _in_order(self) -> Settings:
        if not (self.fine_tune or self.layerwise or self.soft or self.hard):
            raise ValueError("layerwise, soft and hard are 0: no stage is left to run")
        if self.hard and not self.learns_routers:
            raise ValueError("hard needs routers, and both layerwise and soft, which learn them, are 0")
        if self.router == "copy":
            for name, wanted in (("select", "threshold"), ("masks", "straight"), ("lora_rank", 0)):
                if getattr(self, name) != wanted:
                    raise ValueError(f"{name}: routers that are copies (router: copy) go with {name} {wanted} alone")
            if self.learns_routers and not self.layerwise:
                raise ValueError("layerwise: routers that are copies get their density there; give it a small share")
        return self

    @property
    def learns_routers(self) -> bool:
        """Whether a stage learns routers; else the model is only fine-tuned."""
        return self.layerwise > 0 or self.soft > 0

    def shares(self) -> dict[str, float]:
        """Stage → its share of the run, of those that run; they add up to 1."""
        weights = {name: float(getattr(self, name) or 0.0) for name in STAGES}
        total = sum(weights.values())
        return {name: share / total for name, share in weights.items() if share}
