"""The recipe's section `engine`: how targets that build engines build them, apart from the sizes they serve."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field, field_validator

from trimtab.compiler.counts import check_count
from trimtab.passes.errors import RecipeError

MAX_THREADS = 1024
"""Maximum of CPU threads of one run; no machine gains from more. ONNX Runtime starts as many threads as it is asked
for, and hangs where the system has no memory for them. A constant, so that a recipe is valid on every machine or none.
"""


def check_threads(threads: int | None, name: str = "threads") -> None:
    """Refuse a number of CPU threads that no run can have. None leaves the number to the runtime.

    Args:
        name: name of the argument or option, for the message.

    Raises:
        InputError: `threads` is not an integer from 1 to `MAX_THREADS`.
    """
    if threads is not None:
        hint = "give at most the number of cores, or remove it: the runtime chooses"
        check_count(name, threads, maximum=MAX_THREADS, hint=hint)


class EngineOptions(BaseModel):
    """Options for building engines.

    Attributes:
        segments: number of engines that the model is cut into, which run one after the other. None: one engine, but
            where samples exit early, one up to each exit and one for the rest.
        gpus: compute capabilities to build for, such as "8.9"; empty: the library's default.
        weight_streaming: weights may stay in host memory and are copied to the GPU when they are needed.
        refit: weights can be replaced without building the engine again.
        timeout_s: seconds after which the builder is stopped.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    segments: int | None = Field(None, ge=1, le=64)
    gpus: tuple[str, ...] = ()
    weight_streaming: bool = False
    refit: bool = False
    timeout_s: float = Field(3600, gt=0)

    def meant_for(self, gpu: str | None) -> bool:
        """Whether the engines are built for GPUs of compute capability `gpu`; some are built for another machine."""
        return not self.gpus or gpu in self.gpus

    @field_validator("gpus")
    @classmethod
    def _numbers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for gpu in value:
            if not re.fullmatch(r"\d+\.\d", gpu):
                raise RecipeError(f"engine.gpus: {gpu!r} is no compute capability", hint='give one such as "8.9"')
        return value
