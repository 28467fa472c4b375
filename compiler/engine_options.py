"""How engines are built, beyond the sizes they serve: a section of the recipe, for targets that build engines."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field, field_validator

from trimtab.passes.errors import RecipeError


class EngineOptions(BaseModel):
    """Wishes for engines.

    Attributes:
        segments: engines that the model is cut into, which run one after the other. None: one, and where samples leave
            early, one up to each exit and one for the rest.
        gpus: compute capabilities to build for, such as "8.9"; none: what the library takes for usual.
        weight_streaming: weights may stay in host memory and come as they are needed.
        refit: weights can be replaced without building again.
        timeout_s: seconds after which a build is given up.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    segments: int | None = Field(None, ge=1, le=64)
    gpus: tuple[str, ...] = ()
    weight_streaming: bool = False
    refit: bool = False
    timeout_s: float = Field(3600, gt=0)

    def meant_for(self, gpu: str | None) -> bool:
        """Whether GPUs of compute capability `gpu` are to run the engines: portable ones may be for another machine."""
        return not self.gpus or gpu in self.gpus

    @field_validator("gpus")
    @classmethod
    def _numbers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for gpu in value:
            if not re.fullmatch(r"\d+\.\d", gpu):
                raise RecipeError(f"engine.gpus: {gpu!r} is no compute capability", hint='such as "8.9"')
        return value
