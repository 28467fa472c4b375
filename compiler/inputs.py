"""Inputs of an engine, checked before it runs: what a runtime would take and answer wrongly is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from trimtab.passes.errors import InputError, RecipeError
from trimtab.passes.graph.limits import Packed, Positions

if TYPE_CHECKING:  # a Triton repository carries this module, without what compiles
    from trimtab.compiler.builds.manifest import TensorInfo

_MASKS = {"attention_mask", "encoder_attention_mask", "decoder_attention_mask", "input_mask", "mask"}
_PER_TOKEN = ("attention_mask", "token_type_ids", "position_ids")
"""Inputs with a row for each row of `input_ids`."""


def check_inputs(
    wanted: Sequence[TensorInfo],
    given: Mapping[str, np.ndarray],
    packed: Sequence[Packed] = (),
    positions: Positions | None = None,
) -> None:
    """Check a call's inputs: names, types, shapes, sizes that agree, indices and masks, and the length of texts.

    Args:
        wanted: the engine's inputs.
        packed: those of its masks that attention takes as counts of tokens.
        positions: of the model; None where they limit nothing.

    Raises:
        InputError: names the input, and what is wanted.
    """
    names = [tensor.name for tensor in wanted]
    for name in given:
        if name not in names:
            from trimtab.compiler.schema.explain import suggest

            raise InputError(f"unknown input {name!r}", hint=suggest(name, names, "the engine takes"))
    sizes: dict[str, tuple[int, str]] = {}
    for tensor in wanted:
        if tensor.name not in given:
            raise InputError(f"input {tensor.name!r} is missing", hint=f"the engine takes: {', '.join(names)}")
        _check_shape(tensor, given[tensor.name], sizes)
    _check_rows(given)
    check_values(wanted, given, packed)
    check_length(given, positions)


def check_length(given: Mapping[str, np.ndarray], positions: Positions | None) -> None:
    """Refuse inputs that are longer than the model has positions for.

    Raises:
        InputError: says how long they are, and may be.
    """
    longest = 0 if positions is None else positions.longest(given)
    if positions is not None and longest > positions.most:
        raise InputError(
            f"input 'input_ids' has texts of {longest} tokens, the model has positions for {positions.most}",
            hint=f"cut texts to {positions.most} tokens, as engine.tokenize does",
        )


def check_sizes(where: str, tokens: int, past: int, positions: Positions | None) -> None:
    """Refuse texts of `tokens` behind `past` others, where the model does not have so many positions.

    Args:
        where: what asks for them, such as "workload.tokens".

    Raises:
        RecipeError: says how many it has.
    """
    if positions is not None and tokens + past > positions.most:
        behind = f" behind a past of {past}" if past else ""
        raise RecipeError(
            f"{where}: {tokens} tokens{behind} are more than the {positions.most} that the model has positions for",
            hint=f"ask for at most {positions.most}; what a build serves is `workload.tokens` of its recipe",
        )


def check_values(wanted: Sequence[TensorInfo], given: Mapping[str, np.ndarray], packed: Sequence[Packed] = ()) -> None:
    """The part of `check_inputs` that looks at values: indices and masks.

    Raises:
        InputError: names the input, and what is wanted.
    """
    counted = {mask.mask for mask in packed}
    for tensor in wanted:
        if tensor.bounds is not None:
            _check_bounds(tensor.name, given[tensor.name], tensor.bounds)
        if tensor.name in _MASKS or tensor.name in counted:
            _check_mask(tensor.name, given[tensor.name], tensor.name in counted)
    for mask in packed:
        _check_packed(mask, given)


def _check_bounds(name: str, array: np.ndarray, bounds: tuple[int, int]) -> None:
    """Refuse an index that no row of its table has: runtimes take one below 0 for a row from the end.

    Floats are cut to whole numbers on their way to a table; ids are whole as they come.
    """
    least, most = bounds
    rows = np.trunc(array) if array.dtype.kind == "f" else array
    right = (rows >= least) & (rows <= most)  # NaN is none of both
    if name.endswith("ids"):
        right &= rows == array
    if right.all():
        return
    wrong = np.argwhere(~right)[0]
    own = name in ("input_ids", "token_type_ids")
    raise InputError(
        f"input {name!r} holds {array[tuple(wrong)]} at {[int(i) for i in wrong]}, the engine takes {least} to {most}",
        hint="make the inputs with the model's own tokenizer, as engine.tokenize does"
        if own
        else f"give whole numbers from {least} to {most}: the rows that the model's table has",
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


def _check_rows(given: Mapping[str, np.ndarray]) -> None:
    """Refuse what does not go with `input_ids` where the graph's names of the axes do not say so.

    One row of types or positions for a whole batch is spread as it should be. A mask has a row of its own for each
    text, and at least the columns of the ids; more of them stand for a past. A decoder beside an encoder may have the
    mask of what the encoder saw, of any length.
    """
    ids = given.get("input_ids")
    if ids is None or ids.ndim != 2:
        return
    for name in _PER_TOKEN:
        array = given.get(name)
        if array is None or array.ndim != 2:
            continue
        mask = name == "attention_mask"
        if len(array) != len(ids) and (mask or len(array) != 1):
            raise InputError(
                f"inputs 'input_ids' and {name!r} disagree on their rows: {len(ids)} and {len(array)}",
                hint="give a row for each row of 'input_ids'",
            )
        if mask and array.shape[1] < ids.shape[1] and "encoder_hidden_states" not in given:
            raise InputError(
                f"input {name!r} has {array.shape[1]} columns for {ids.shape[1]} of 'input_ids'",
                hint="give 1 for each token and 0 for padding",
            )


def _check_mask(name: str, mask: np.ndarray, counted: bool) -> None:
    """A mask of integers holds 1 for tokens and 0 for padding: what models make of other numbers is no attention.

    One of floats may be what is added to scores, unless attention counts it; it is no number nowhere.
    """
    if mask.ndim != 2 or mask.dtype.kind not in "iuf":
        return
    additive = mask.dtype.kind == "f" and not counted
    right = ~np.isnan(mask) if additive else (mask == 0) | (mask == 1)
    if not right.all():
        wrong = np.argwhere(~right)[0]
        raise InputError(
            f"input {name!r} holds {mask[tuple(wrong)]} at {[int(i) for i in wrong]}",
            hint="leave out what is no number" if additive else "give 1 for tokens and 0 for padding",
        )


def _check_packed(packed: Packed, given: Mapping[str, np.ndarray]) -> None:
    """Refuse rows whose tokens do not come first, which attention would take for others."""
    mask, name = given[packed.mask], packed.mask
    earlier = None if packed.past is None else given[packed.past]
    if mask.ndim != 2 or (earlier is not None and earlier.ndim != 4):
        return
    past = 0 if earlier is None else earlier.shape[2]
    # Some may be of another size, such as one number for each row; the mask goes with one of them at least.
    columns = [given[other].shape[1] for other in packed.tokens if given[other].ndim == 2]
    if columns and mask.shape[1] - past not in columns:
        have = max(columns)
        raise InputError(
            f"input {name!r} has {mask.shape[1]} columns, for {past} tokens of the past and {have} new ones",
            hint=f"give {past + have}: 1 for each token of the past that is real, too",
        )
    _check_past(name, mask[:, :past] != 0)
    _check_new(name, mask[:, past:] != 0, past)


def _check_past(name: str, real: np.ndarray) -> None:
    """Refuse a past, [batch, past], that no calls leave behind.

    A prompt that was shorter than others has zeros behind it, and ones again for the tokens of later steps, which
    attention has written over the padding. A row without any past only begins.
    """
    late = real.any(1) & ~real[:, :1].all(1)
    if late.any():
        _refuse_padding(name, "on the left", int(np.argmax(late)))
    gaps = (real[:, :-1] > real[:, 1:]).sum(1)
    if (gaps > 1).any():
        _refuse_padding(name, "between tokens", int(np.argmax(gaps > 1)))


def _check_new(name: str, new: np.ndarray, past: int) -> None:
    """Refuse new tokens, [batch, tokens], that do not come first in their row."""
    counts = new.sum(1)
    if (counts == 0).any():
        row = int(np.argmax(counts == 0))
        raise InputError(f"input {name!r} has no token in row {row}", hint="leave the row out of the batch")
    late = (new[:, 1:] > new[:, :-1]).any(1)
    if late.any():
        row = int(np.argmax(late))
        _refuse_padding(name, "between tokens" if new[row, 0] else "on the left", row)
    if past and (counts < new.shape[1]).any():
        row = int(np.argmax(counts < new.shape[1]))
        raise InputError(
            f"input {name!r} has padding in row {row} behind {past} tokens of the past",
            hint="give prompts of different lengths in the first call, or each row alone without padding",
        )


def _refuse_padding(name: str, where: str, row: int) -> None:
    raise InputError(
        f"input {name!r} has padding {where} in row {row}, where the engine's attention takes it for tokens",
        hint="pad on the right, as engine.tokenize does",
    )
