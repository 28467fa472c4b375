"""The workload: the sizes an engine must serve. It yields optimization profiles and the corners to check."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated

import onnx_graphsurgeon as gs
from pydantic import BaseModel, BeforeValidator, ConfigDict, field_validator, model_validator

from trimtab.compiler.decoder_cache import pasts
from trimtab.compiler.schema.explain import suggest
from trimtab.passes.errors import RecipeError, quoted

Shape = tuple[int, ...]

MAX_SIZE = 1 << 20
"""Maximum of one dimension. The longest contexts of models have as many tokens."""

MAX_TOKENS = 1 << 24
"""Maximum tokens of one call: samples times tokens, with those of the cache. No machine runs more at once."""

_ALIASES = {
    "batch_size": "batch", "sequence": "tokens", "sequence_length": "tokens", "seq": "tokens", "seq_len": "tokens",
    "past_sequence_length": "past", "total_sequence_length": "total",
}  # fmt: skip
"""Other exporters' names of the axes → ours."""


def _fixed(value: object) -> object:
    """Expand one number to (min, opt, max)."""
    return (value,) * 3 if isinstance(value, int) and not isinstance(value, bool) else value


Range = Annotated[tuple[int, int, int], BeforeValidator(_fixed)]
"""(min, opt, max) of one dimension; a recipe may give one number for a fixed size."""


class Workload(BaseModel):
    """Sizes of the dynamic dimensions, each as (min, opt, max); the engine is fastest at opt.

    Attributes:
        batch: samples in one call.
        tokens: tokens in one sample, padding included.
        past: tokens in a decoder's cache before the call; 0 is a prompt. "total" is past and tokens together.
        dims: every other symbolic dimension of the model's inputs, by its name in the ONNX file.
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
        return _check(name, value, lower_bound=0 if name == "past" else 1)

    @field_validator("dims")
    @classmethod
    def _dims_ordered(cls, value: dict[str, tuple[int, int, int]]) -> dict[str, tuple[int, int, int]]:
        for reserved in ("batch", "tokens", "past"):
            if reserved in value:
                raise RecipeError(f"workload.dims: {reserved!r} has a key of its own", hint=f"set workload.{reserved}")
        if "total" in value:
            raise RecipeError(
                "workload.dims: 'total' is past and tokens together", hint="set workload.past and .tokens"
            )
        return {name: _check(f"dims.{name}", sizes) for name, sizes in value.items()}

    @model_validator(mode="after")
    def _bounded(self) -> Workload:
        declared = self.tokens[2] if self.tokens != type(self).model_fields["tokens"].default else 1
        tokens = self.batch[2] * (declared + self.past[2])  # the default says nothing of models without tokens
        if tokens > MAX_TOKENS:
            raise RecipeError(
                f"workload: batch {self.batch[2]} with {declared + self.past[2]} tokens each are {tokens} tokens "
                f"in a call, more than {MAX_TOKENS}",
                hint="give sizes of real calls",
            )
        return self

    def fitting(self, longest: int | None) -> Workload:
        """This workload for a model of at most `longest` tokens: a default range is clipped, a declared one stays."""
        if longest is None or self.tokens != type(self).model_fields["tokens"].default:
            return self
        return self.model_copy(update={"tokens": tuple(min(size, longest) for size in self.tokens)})

    def tokens_of_call(self, *, cached: bool, fixed: int | None = None) -> int:
        """Total tokens, over all samples, of the call for which the engine is optimized.

        Args:
            cached: the model is a decoder with a cache. Its most frequent call is a step, with one token per sample;
                with one sample, if the workload declares prompts only.
            fixed: tokens per sample if the model fixes their number, as models of images do.
        """
        batch, tokens = self.batch[1], fixed or self.tokens[1]
        if not cached:
            return batch * tokens
        return batch if self.past[2] > 0 or tokens == 1 else 1

    def axes(self, graph: gs.Graph) -> dict[str, tuple[int | str, ...]]:
        """Shape of every input. A dynamic axis is the name of its dimension: "batch", "tokens", "past", "total" or a
        key of `dims`.

        The dimension of an axis is its key in `dims`; else its role in a decoder's cache, [batch, heads, past, width],
        and mask, [batch, total]; else that of its name in the ONNX file. If none of these is known, an input's first
        dynamic axis is the batch and its second the tokens. An axis without a name is called "<input>.<position>".

        Raises:
            RecipeError: a dynamic axis has no range in this workload.
        """
        inputs = {tensor.name: _symbols(tensor) for tensor in graph.inputs}
        roles = _cache_roles(inputs)
        for name, shape in sorted(inputs.items(), key=lambda item: -_dynamic(item[1])):
            order = iter(("batch", "tokens"))
            for axis in (axis for axis in shape if isinstance(axis, str)):
                by_order = next(order, None)
                role = axis if axis in self.dims else roles.get(axis) or _dimension(axis) or by_order
                if role is None:
                    key = json.dumps(axis)  # valid YAML, whatever characters the name has
                    raise RecipeError(
                        f"input {name!r}: its dynamic axis {axis!r} has no range in the workload",
                        hint=f"add `dims: {{{key}: [min, opt, max]}}` to the recipe's workload",
                    )
                roles[axis] = role
        return {
            name: tuple(roles[axis] if isinstance(axis, str) else axis for axis in shape)
            for name, shape in inputs.items()
        }

    def dimensions(self, graph: gs.Graph) -> set[str]:
        """Names of the dimensions on which an input's shape depends, among "batch", "tokens", "past" and `dims`."""
        used = {axis for axes in self.axes(graph).values() for axis in axes if isinstance(axis, str)}
        return used - {"total"}

    def check_dims(self, graph: gs.Graph) -> None:
        """Refuse sizes of dimensions that the inputs of `graph` do not have.

        Raises:
            RecipeError: names the nearest dimension.
        """
        known = self.dimensions(graph)
        for name in self.dims:
            if name not in known:
                raise RecipeError(
                    f"workload.dims: the model has no dimension {quoted(name)}",
                    hint=suggest(name, sorted(known), "its inputs have"),
                )

    def shapes_at(self, graph: gs.Graph, sizes: Mapping[str, int]) -> dict[str, Shape]:
        """Shape of every input for the `sizes` of the dimensions, such as one of `corners()`."""
        axes, past = self.axes(graph), sizes.get("past", 0)
        new = axes.get("input_ids", ())[1:2]  # a file for steps only has a fixed size here
        tokens = new[0] if new and isinstance(new[0], int) else sizes["tokens"]
        all_sizes = {**sizes, "past": past, "total": past + tokens}
        return {
            name: tuple(all_sizes[axis] if isinstance(axis, str) else axis for axis in shape)
            for name, shape in axes.items()
        }

    def shapes(self, graph: gs.Graph) -> dict[str, tuple[Shape, Shape, Shape]]:
        """(min, opt, max) shape of every input: one optimization profile."""
        low, opt, high = (self.shapes_at(graph, self._sizes(level)) for level in range(3))
        return {name: (low[name], opt[name], high[name]) for name in low}

    def corners(self) -> list[dict[str, int]]:
        """Distinct sizes at which to check a build: min, opt, max, and batch and tokens at opposite extremes."""
        low, opt, high = (self._sizes(level) for level in range(3))
        mixed = [low | {"batch": high["batch"]}, high | {"batch": low["batch"]}]
        unique = {tuple(sizes.items()): sizes for sizes in (low, opt, high, *mixed)}
        return list(unique.values())

    def _sizes(self, level: int) -> dict[str, int]:
        past = {"past": self.past} if any(self.past) else {}
        ranges = {"batch": self.batch, "tokens": self.tokens, **past, **self.dims}
        return {name: sizes[level] for name, sizes in ranges.items()}


def _check(name: str, value: tuple[int, int, int], lower_bound: int = 1) -> tuple[int, int, int]:
    low, opt, high = value
    if high > MAX_SIZE:
        raise RecipeError(
            f"workload.{name}: {quoted(high)} is more than the largest size, {MAX_SIZE}", hint="give sizes of calls"
        )
    if not lower_bound <= low <= opt <= high:
        raise RecipeError(
            f"workload.{name}: {list(value)} is not [min, opt, max] with {lower_bound} <= min <= opt <= max",
            hint="for one fixed size n, give n alone",
        )
    return value


def _symbols(tensor: gs.Tensor) -> tuple[int | str, ...]:
    """The shape of an input, with a name for every dynamic axis."""
    if tensor.shape is None:
        raise RecipeError(f"input {tensor.name!r} has no shape in the ONNX file", hint="export the model with shapes")
    return tuple(
        axis if isinstance(axis, str) or (isinstance(axis, int) and axis >= 0) else f"{tensor.name}.{position}"
        for position, axis in enumerate(tensor.shape)
    )


def _dimension(axis: str) -> str | None:
    """The dimension for an exporter's name of an axis; None for an unknown name."""
    return axis if axis in ("batch", "tokens", "past", "total") else _ALIASES.get(axis.lower())


def _cache_roles(inputs: Mapping[str, tuple[int | str, ...]]) -> dict[str, str]:
    """Dynamic axis → dimension, for a decoder's cache and its mask, whatever names the exporter uses."""
    caches = [inputs[name] for name in pasts(inputs) if len(inputs[name]) == 4]
    if not caches:
        return {}
    roles = {shape[axis]: role for shape in caches for axis, role in ((0, "batch"), (2, "past"))}
    mask, ids = (inputs.get(name, ()) for name in ("attention_mask", "input_ids"))
    if len(mask) == len(ids) == 2 and mask[1] != ids[1]:
        roles[mask[1]] = "total"
    return {axis: role for axis, role in roles.items() if isinstance(axis, str)}


def _dynamic(shape: tuple[int | str, ...]) -> int:
    return sum(isinstance(axis, str) for axis in shape)
