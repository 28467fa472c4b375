"""The workload: the sizes an engine must serve; hence optimization profiles, and the corners to check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import onnx_graphsurgeon as gs
from pydantic import BaseModel, BeforeValidator, ConfigDict, field_validator

from trimtab.passes.errors import RecipeError

Shape = tuple[int, ...]

_ALIASES = {
    "batch_size": "batch", "sequence": "tokens", "sequence_length": "tokens", "seq": "tokens", "seq_len": "tokens",
    "past_sequence_length": "past", "total_sequence_length": "total",
}  # fmt: skip
"""How other exporters call the axes."""


def _fixed(value: object) -> object:
    """A single size stands for all three."""
    return (value,) * 3 if isinstance(value, int) else value


Range = Annotated[tuple[int, int, int], BeforeValidator(_fixed)]
"""(min, opt, max) of one dimension; a recipe may give one number for a fixed size."""


class Workload(BaseModel):
    """Sizes of the dynamic dimensions, each as (min, opt, max); the engine is fastest at opt.

    Attributes:
        batch: samples in one call.
        tokens: tokens in one sample, padding included.
        past: tokens that a decoder's cache holds already; 0 is a prompt. "total" is both together.
        dims: any other symbolic dimension of the model's inputs, by its name in the ONNX file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch: Range = (1, 8, 32)
    tokens: Range = (8, 48, 128)
    past: Range = (0, 0, 0)
    dims: dict[str, Range] = {}

    @field_validator("batch", "tokens", "past")
    @classmethod
    def _ordered(cls, value: tuple[int, int, int], info: object) -> tuple[int, int, int]:
        name = str(getattr(info, "field_name", ""))
        return _check(name, value, least=0 if name == "past" else 1)

    @field_validator("dims")
    @classmethod
    def _dims_ordered(cls, value: dict[str, tuple[int, int, int]]) -> dict[str, tuple[int, int, int]]:
        for reserved in ("batch", "tokens", "past"):
            if reserved in value:
                raise RecipeError(f"workload.dims: {reserved!r} has a key of its own", hint=f"set workload.{reserved}")
        return {name: _check(f"dims.{name}", sizes) for name, sizes in value.items()}

    def tokens_of_call(self, *, cached: bool, fixed: int | None = None) -> int:
        """Tokens, in all samples together, of the calls for which the engine is to be fastest.

        Args:
            cached: the model is a decoder with a cache. What is repeated then is its step, of a token of each sample;
                or of one sample, where the workload declares prompts alone.
            fixed: tokens of each sample, where the model has no choice, as those of images.
        """
        batch, tokens = self.batch[1], fixed or self.tokens[1]
        if not cached:
            return batch * tokens
        return batch if self.past[2] > 0 or tokens == 1 else 1

    def axes(self, graph: gs.Graph) -> dict[str, tuple[int | str, ...]]:
        """Shape of every input, each dynamic axis by the name of its dimension: "batch", "tokens", "past", "total" or
        a key of `dims`.

        An axis is known by its name in the ONNX file. Where that says nothing, an input's first dynamic axis is the
        batch and its second the tokens. An axis without a name is called "<input>.<position>".

        Raises:
            RecipeError: a dynamic axis has no range in this workload.
        """
        found: dict[str, str] = {}
        inputs = {tensor.name: _symbols(tensor) for tensor in graph.inputs}
        for name, shape in sorted(inputs.items(), key=lambda item: -_dynamic(item[1])):
            order = iter(("batch", "tokens"))
            for axis in (axis for axis in shape if isinstance(axis, str)):
                place = next(order, None)
                dim = self._named(axis) or found.get(axis) or place
                if dim is None:
                    raise RecipeError(
                        f"input {name!r}: its dynamic axis {axis!r} has no range in the workload",
                        hint=f"add `dims: {{{axis}: [min, opt, max]}}` to the recipe's workload",
                    )
                found[axis] = dim
        return {
            name: tuple(found[axis] if isinstance(axis, str) else axis for axis in shape)
            for name, shape in inputs.items()
        }

    def shapes_at(self, graph: gs.Graph, sizes: Mapping[str, int]) -> dict[str, Shape]:
        """Shape of every input where the dimensions have `sizes`, such as one of `corners()`."""
        past = sizes.get("past", 0)
        known = {"past": past, "total": past + sizes["tokens"], **sizes}
        return {
            name: tuple(known[axis] if isinstance(axis, str) else axis for axis in axes)
            for name, axes in self.axes(graph).items()
        }

    def shapes(self, graph: gs.Graph) -> dict[str, tuple[Shape, Shape, Shape]]:
        """(min, opt, max) shape of every input: one optimization profile."""
        low, opt, high = (self.shapes_at(graph, self._sizes(level)) for level in range(3))
        return {name: (low[name], opt[name], high[name]) for name in low}

    def corners(self) -> list[dict[str, int]]:
        """Sizes to check a build at: min, opt, max, and batch against tokens at opposite ends. Each once."""
        low, opt, high = (self._sizes(level) for level in range(3))
        mixed = [low | {"batch": high["batch"]}, high | {"batch": low["batch"]}]
        unique = {tuple(sizes.items()): sizes for sizes in (low, opt, high, *mixed)}
        return list(unique.values())

    def _named(self, axis: str) -> str | None:
        if axis in self.dims or axis in ("batch", "tokens", "past", "total"):
            return axis
        return _ALIASES.get(axis.lower())

    def _sizes(self, level: int) -> dict[str, int]:
        past = {"past": self.past} if any(self.past) else {}
        ranges = {"batch": self.batch, "tokens": self.tokens, **past, **self.dims}
        return {name: sizes[level] for name, sizes in ranges.items()}


def _check(name: str, value: tuple[int, int, int], least: int = 1) -> tuple[int, int, int]:
    low, opt, high = value
    if not least <= low <= opt <= high:
        raise RecipeError(
            f"workload.{name}: {list(value)} is not [min, opt, max] with {least} <= min <= opt <= max",
            hint="for one fixed size n, give n alone",
        )
    return value


def _symbols(tensor: gs.Tensor) -> tuple[int | str, ...]:
    """The shape of an input; every dynamic axis as a name."""
    if tensor.shape is None:
        raise RecipeError(f"input {tensor.name!r} has no shape in the ONNX file", hint="export the model with shapes")
    return tuple(
        axis if isinstance(axis, str) or (isinstance(axis, int) and axis >= 0) else f"{tensor.name}.{position}"
        for position, axis in enumerate(tensor.shape)
    )


def _dynamic(shape: tuple[int | str, ...]) -> int:
    return sum(isinstance(axis, str) for axis in shape)
