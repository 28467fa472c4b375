"""Inputs of an engine, checked before it runs: what a runtime would take and answer wrongly is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from trimtab.compiler.builds.manifest import TensorInfo
from trimtab.compiler.strict import suggest
from trimtab.passes.errors import InputError
from trimtab.passes.graph.ranges import Packed

_MASK = "attention_mask"


def check_inputs(wanted: Sequence[TensorInfo], given: Mapping[str, np.ndarray], packed: Sequence[Packed] = ()) -> None:
    """Check a call's inputs: names, types, shapes, sizes that agree, indices and masks.

    Args:
        wanted: the engine's inputs.
        packed: those of its masks that attention takes as counts of tokens.

    Raises:
        InputError: names the input, and what is wanted.
    """
    names = [tensor.name for tensor in wanted]
    for name in given:
        if name not in names:
            raise InputError(f"unknown input {name!r}", hint=suggest(name, names, "the engine takes"))
    sizes: dict[str, tuple[int, str]] = {}
    for tensor in wanted:
        if tensor.name not in given:
            raise InputError(f"input {tensor.name!r} is missing", hint=f"the engine takes: {', '.join(names)}")
        _check_shape(tensor, given[tensor.name], sizes)
    check_values(wanted, given, packed)


def check_values(wanted: Sequence[TensorInfo], given: Mapping[str, np.ndarray], packed: Sequence[Packed] = ()) -> None:
    """The part of `check_inputs` that looks at values: indices and masks.

    Raises:
        InputError: names the input, and what is wanted.
    """
    for tensor in wanted:
        if tensor.bounds is not None:
            _check_bounds(tensor.name, given[tensor.name], tensor.bounds)
        if tensor.name == _MASK or any(tensor.name == mask.mask for mask in packed):
            _check_mask(tensor.name, given[tensor.name])
    for mask in packed:
        _check_packed(mask, wanted, given)


def _check_bounds(name: str, array: np.ndarray, bounds: tuple[int, int]) -> None:
    """Refuse an index that no row of its table has: runtimes take one below 0 for a row from the end."""
    if not array.size:
        return
    least, most = bounds
    low, high = int(array.min()), int(array.max())
    if low < least or high > most:
        wrong = low if low < least else high
        place = [int(i) for i in np.argwhere(array == wrong)[0]]
        raise InputError(
            f"input {name!r} holds {wrong} at {place}, the engine takes {least} to {most}",
            hint="make the inputs with the model's own tokenizer, as engine.tokenize does",
        )


def _check_shape(tensor: TensorInfo, array: np.ndarray, sizes: dict[str, tuple[int, str]]) -> None:
    """Check one input; `sizes` remembers the size of each named dimension, and which input set it."""
    if not isinstance(array, np.ndarray):
        raise InputError(
            f"input {tensor.name!r} is a {type(array).__name__}, not a numpy array",
            hint=f"give np.asarray(..., dtype=np.{tensor.dtype})",
        )
    if str(array.dtype) != tensor.dtype:
        raise InputError(
            f"input {tensor.name!r} is {array.dtype}, the engine takes {tensor.dtype}",
            hint=f"convert it with .astype(np.{tensor.dtype})",
        )
    if tensor.shape is None:
        return
    shown = "[" + ", ".join("?" if size is None else str(size) for size in tensor.shape) + "]"
    fits = array.ndim == len(tensor.shape) and all(
        size == have for size, have in zip(tensor.shape, array.shape, strict=True) if isinstance(size, int)
    )
    if not fits:
        raise InputError(f"input {tensor.name!r} has the shape {list(array.shape)}, the engine takes {shown}")
    for name, have in zip(tensor.shape, array.shape, strict=True):
        if isinstance(name, str):
            size, other = sizes.setdefault(name, (have, tensor.name))
            if size != have:
                raise InputError(f"inputs {other!r} and {tensor.name!r} disagree on {name}: {size} and {have}")


def _check_mask(name: str, mask: np.ndarray) -> None:
    """A mask of integers holds 1 for tokens and 0 for padding: what models make of other numbers is no attention."""
    if mask.dtype.kind in "iu" and mask.ndim == 2 and mask.size and (mask.min() < 0 or mask.max() > 1):
        wrong = np.argwhere((mask != 0) & (mask != 1))[0]
        raise InputError(
            f"input {name!r} holds {mask[tuple(wrong)]} at {[int(i) for i in wrong]}",
            hint="give 1 for tokens and 0 for padding",
        )


def _check_packed(packed: Packed, wanted: Sequence[TensorInfo], given: Mapping[str, np.ndarray]) -> None:
    """Refuse rows whose new tokens do not come first, which attention would take for others."""
    mask, name = given[packed.mask], packed.mask
    earlier = None if packed.past is None else given[packed.past]
    if mask.ndim != 2 or (earlier is not None and earlier.ndim != 4):
        return
    past = 0 if earlier is None else earlier.shape[2]
    tokens = mask.shape[1] - past
    for tensor in wanted:
        if tensor.bounds is not None and given[tensor.name].ndim == 2 and given[tensor.name].shape[1] != tokens:
            have = given[tensor.name].shape[1]
            raise InputError(
                f"input {name!r} has {mask.shape[1]} columns, for {past} tokens of the past and {have} new ones",
                hint=f"give {past + have}: 1 for each token of the past that is real, too",
            )
    new = mask[:, past:] != 0
    counts = new.sum(1)
    if (counts == 0).any():
        row = int(np.argmax(counts == 0))
        raise InputError(f"input {name!r} has no token in row {row}", hint="leave the row out of the batch")
    if (new[:, 1:] > new[:, :-1]).any():
        row = int(np.argmax((new[:, 1:] > new[:, :-1]).any(1)))
        where = "on the left" if not new[row, 0] else "between tokens"
        raise InputError(
            f"input {name!r} has padding {where} in row {row}, where the engine's attention takes it for tokens",
            hint="pad on the right, as engine.tokenize does",
        )
    if past and tokens > 1 and (counts < tokens).any():
        row = int(np.argmax(counts < tokens))
        raise InputError(
            f"input {name!r} has padding in row {row} behind {past} tokens of the past",
            hint="give prompts of different lengths in the first call, or each row alone without padding",
        )
