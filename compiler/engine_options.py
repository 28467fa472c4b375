"""How engines are built, beyond the sizes they serve: a section of the recipe, for targets that build engines."""

from __future__ import annotations

import re
from numbers import Integral

from pydantic import BaseModel, ConfigDict, Field, field_validator

from trimtab.passes.errors import InputError, RecipeError

MAX_THREADS = 1024
"""CPU threads of one run: more than any machine gains from. ONNX Runtime starts as many as it is asked for, and does
not come back where the system has no room for them. A constant, so that a recipe is valid on every machine or on none.
"""


def check_threads(threads: int | None, name: str = "threads") -> None:
    """Refuse a number of CPU threads that no run can have; None leaves it to the runtime.

    Args:
        name: of the argument or option, for the message.

    Raises:
        InputError: it is not an integer from 1 to `MAX_THREADS`.
    """
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, Integral) or not 1 <= threads <= MAX_THREADS:
        raise InputError(
            f"{name} is {threads!r}, not an integer from 1 to {MAX_THREADS}",
            hint="give at most the number of cores, or leave it out: the runtime chooses",
        )


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
