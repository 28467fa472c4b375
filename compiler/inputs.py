"""Checks of an engine's inputs before it runs: input that a runtime would answer wrongly is refused by name."""

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
    specs: Sequence[TensorInfo],
    feeds: Mapping[str, np.ndarray],
    packed: Sequence[Packed] = (),
    positions: Positions | None = None,
) -> None:
    """Check a call's inputs: names, types, shapes, sizes that agree, indices, masks, and the length of texts.

    Args:
        specs: the engine's inputs.
        feeds: the inputs of the call.
        packed: the masks that attention reads as counts of tokens.
        positions: the model's positions; None where they do not limit the length.

    Raises:
        InputError: names the input and what the engine takes.
    """
    names = [tensor.name for tensor in specs]
    if not isinstance(feeds, Mapping):
        raise InputError(
            f"inputs is of type {type(feeds).__name__}, not a mapping", hint="give inputs={name: numpy array}"
        )
    for name in feeds:
        if name not in names:
            from trimtab.compiler.schema.explain import suggest

            raise InputError(f"unknown input {name!r}", hint=suggest(str(name), names, "the engine takes"))
    sizes: dict[str, tuple[int, str]] = {}
    for tensor in specs:
        if tensor.name not in feeds:
            raise InputError(f"input {tensor.name!r} is missing", hint=f"the engine takes: {', '.join(names)}")
        _check_shape(tensor, feeds[tensor.name], sizes)
    _check_rows(feeds)
    check_values(specs, feeds, packed)
    check_length(feeds, positions)


def check_length(feeds: Mapping[str, np.ndarray], positions: Positions | None) -> None:
    """Refuse texts that are longer than the model has positions for.

    Raises:
        InputError: states the length and the maximum.
    """
    longest = 0 if positions is None else positions.longest(feeds)
    if positions is not None and longest > positions.most:
        raise InputError(
            f"input 'input_ids' has texts of {longest} tokens, the model has positions for {positions.most}",
            hint=f"cut texts to {positions.most} tokens, as engine.tokenize does",
        )


def check_sizes(where: str, tokens: int, past: int, positions: Positions | None) -> None:
    """Refuse texts of `tokens` tokens after a past of `past` tokens if the model has fewer positions.

    Args:
        where: the option that asks for them, such as "workload.tokens".

    Raises:
        RecipeError: states how many positions the model has.
    """
    if positions is not None and tokens + past > positions.most:
        behind = f" behind a past of {past}" if past else ""
        raise RecipeError(
            f"{where}: {tokens} tokens{behind} are more than the {positions.most} that the model has positions for",
            hint=f"ask for at most {positions.most}; what a build serves is `workload.tokens` of its recipe",
        )


def check_values(specs: Sequence[TensorInfo], feeds: Mapping[str, np.ndarray], packed: Sequence[Packed] = ()) -> None:
    """The part of `check_inputs` that reads values: indices and masks.

    Raises:
        InputError: names the input and what the engine takes.
    """
    packed_masks = {mask.mask for mask in packed}
    for tensor in specs:
        if tensor.bounds is not None:
            _check_bounds(tensor.name, feeds[tensor.name], tensor.bounds)
        if tensor.name in _MASKS or tensor.name in packed_masks:
            _check_mask(tensor.name, feeds[tensor.name], tensor.name in packed_masks)
    for mask in packed:
        _check_packed(mask, feeds)


def _check_bounds(name: str, array: np.ndarray, bounds: tuple[int, int]) -> None:
    """Refuse an index outside its table. Runtimes count an index below 0 from the end of the table.

    Graphs truncate floats before they index a table; ids must be whole numbers.
    """
    low, high = bounds
    rows = np.trunc(array) if array.dtype.kind == "f" else array
    valid = (rows >= low) & (rows <= high)  # NaN is neither
    if name.endswith("ids"):
        valid &= rows == array
    if valid.all():
        return
    wrong = np.argwhere(~valid)[0]
    from_tokenizer = name in ("input_ids", "token_type_ids")
    raise InputError(
        f"input {name!r} holds {array[tuple(wrong)]} at {[int(i) for i in wrong]}, the engine takes {low} to {high}",
        hint="make the inputs with the model's own tokenizer, as engine.tokenize does"
        if from_tokenizer
        else f"give whole numbers from {low} to {high}: the rows that the model's table has",
    )


def _check_shape(tensor: TensorInfo, array: np.ndarray, sizes: dict[str, tuple[int, str]]) -> None:
    """Check one input. `sizes` stores the size of each named dimension, and the input that set it."""
    if not isinstance(array, np.ndarray):
        raise InputError(
            f"input {tensor.name!r} is a {type(array).__name__}, not a numpy array",
            hint=f"give np.asarray(..., dtype=np.{tensor.dtype})",
        )
    if isinstance(array, np.ma.MaskedArray):
        raise InputError(
            f"input {tensor.name!r} is a masked array, and engines know no masks of values", hint="fill it: .filled(0)"
        )
    kind = "object" if tensor.dtype == "object" else f"np.{tensor.dtype}"
    if str(array.dtype) != tensor.dtype:
        raise InputError(
            f"input {tensor.name!r} is {array.dtype}, the engine takes {tensor.dtype}",
            hint=f"convert it with .astype({kind})",
        )
    if tensor.dtype == "object":
        _check_texts(tensor.name, array)
    if tensor.shape is None:
        return
    shown = "[" + ", ".join("?" if size is None else str(size) for size in tensor.shape) + "]"
    fits = array.ndim == len(tensor.shape) and all(
        size == actual for size, actual in zip(tensor.shape, array.shape, strict=True) if isinstance(size, int)
    )
    if not fits:
        raise InputError(
            f"input {tensor.name!r} has the shape {list(array.shape)}, the engine takes {shown}",
            hint="give an array of that shape; where there is a name, any size goes",
        )
    for name, actual in zip(tensor.shape, array.shape, strict=True):
        if isinstance(name, str):
            size, other = sizes.setdefault(name, (actual, tensor.name))
            if size != actual:
                raise InputError(
                    f"inputs {other!r} and {tensor.name!r} disagree on {name}: {size} and {actual}",
                    hint="make all inputs of one call together, as engine.tokenize does",
                )


def _check_texts(name: str, array: np.ndarray) -> None:
    """Refuse what is no text: ONNX Runtime would write bytes and numbers as Python shows them."""
    for place, text in enumerate(array.flat):
        if not isinstance(text, str):
            raise InputError(
                f"input {name!r} holds a {type(text).__name__} at place {place}, not a text",
                hint="decode bytes first, with .decode(); write numbers as texts",
            )
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            raise InputError(
                f"input {name!r} holds half a character at place {place}", hint="read it with its own encoding"
            )


def _check_rows(feeds: Mapping[str, np.ndarray]) -> None:
    """Refuse texts of no tokens, and inputs that do not match `input_ids` where the names of the graph's axes do not
    show the mismatch.

    One row of types or positions is broadcast to the whole batch. A mask has one row per text, and at least as many
    columns as the ids; further columns are a past. The mask of a decoder with an encoder may be the encoder's mask, of
    any length.
    """
    ids = feeds.get("input_ids")
    if ids is None or ids.ndim != 2:
        return
    if not ids.shape[1]:
        raise InputError(f"input 'input_ids' has texts of 0 tokens: {list(ids.shape)}", hint="give each text a token")
    for name in _PER_TOKEN:
        array = feeds.get(name)
        if array is None or array.ndim != 2:
            continue
        mask = name == "attention_mask"
        if len(array) != len(ids) and (mask or len(array) != 1):
            raise InputError(
                f"inputs 'input_ids' and {name!r} disagree on their rows: {len(ids)} and {len(array)}",
                hint="give a row for each row of 'input_ids'",
            )
        if mask and array.shape[1] < ids.shape[1] and "encoder_hidden_states" not in feeds:
            raise InputError(
                f"input {name!r} has {array.shape[1]} columns for {ids.shape[1]} of 'input_ids'",
                hint="give 1 for each token and 0 for padding",
            )


def _check_mask(name: str, mask: np.ndarray, packed: bool) -> None:
    """Refuse masks that hold other values than 1 for tokens and 0 for padding.

    A mask of floats may be a term that is added to the scores, unless attention counts it; then only NaN is refused.
    """
    if mask.ndim != 2 or mask.dtype.kind not in "iuf":
        return
    additive = mask.dtype.kind == "f" and not packed
    valid = ~np.isnan(mask) if additive else (mask == 0) | (mask == 1)
    if not valid.all():
        wrong = np.argwhere(~valid)[0]
        raise InputError(
            f"input {name!r} holds {mask[tuple(wrong)]} at {[int(i) for i in wrong]}",
            hint="replace NaN by numbers" if additive else "give 1 for tokens and 0 for padding",
        )


def _check_packed(packed: Packed, feeds: Mapping[str, np.ndarray]) -> None:
    """Refuse rows whose tokens do not come first: packed attention would read other tokens instead."""
    mask, name = feeds[packed.mask], packed.mask
    earlier = None if packed.past is None else feeds[packed.past]
    if mask.ndim != 2 or (earlier is not None and earlier.ndim != 4):
        return
    past = 0 if earlier is None else earlier.shape[2]
    # Some inputs may have another size, such as one number per row; the mask must match at least one of them.
    columns = [feeds[other].shape[1] for other in packed.tokens if feeds[other].ndim == 2]
    if columns and mask.shape[1] - past not in columns:
        new = max(columns)
        raise InputError(
            f"input {name!r} has {mask.shape[1]} columns, for {past} tokens of the past and {new} new ones",
            hint=f"give {past + new}: 1 for each token of the past that is real, too",
        )
    _check_past(name, mask[:, :past] != 0)
    _check_new(name, mask[:, past:] != 0, past)


def _check_past(name: str, real: np.ndarray) -> None:
    """Refuse a past, [batch, past], that no sequence of calls produces.

    A prompt that was shorter than others has zeros after it, and then ones for the tokens of later steps, which
    attention wrote over the padding. A row without any past starts now.
    """
    late = real.any(1) & ~real[:, :1].all(1)
    if late.any():
        _refuse_padding(name, "on the left", int(np.argmax(late)))
    gaps = (real[:, :-1] > real[:, 1:]).sum(1)
    if (gaps > 1).any():
        _refuse_padding(name, "between tokens", int(np.argmax(gaps > 1)))


def _check_new(name: str, new: np.ndarray, past: int) -> None:
    """Refuse new tokens, [batch, tokens], that are not at the start of their row."""
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
