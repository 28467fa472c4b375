"""Checks texts and token limits that users pass in, before any tokenizer reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral
from typing import Any

from trimtab.passes.errors import InputError

Text = str | tuple[str, str]
"""One text, or a pair of texts that the model reads together, such as a query and a passage."""

_HINT = 'give a list of texts, such as ["a text"]; a pair is a tuple of two, such as ("a query", "a passage")'


def checked_texts(texts: Any) -> list[Text]:
    """`texts` as a list of strings and of tuples of two strings.

    Raises:
        InputError: `texts` is a single string, or holds anything but strings and pairs of strings; names the place.
    """
    if isinstance(texts, (str, bytes, bytearray, Mapping, Set)) or not isinstance(texts, Iterable):
        raise InputError(f"texts is {_kind(texts)}, not a list of texts", hint=_HINT)
    return [_checked(text, place) for place, text in enumerate(texts)]


def checked_prompts(prompts: Any) -> list[str]:
    """`prompts` as a list of strings.

    Raises:
        InputError: `checked_texts` refuses `prompts`, or a prompt is a pair.
    """
    checked = checked_texts(prompts)
    for place, text in enumerate(checked):
        if isinstance(text, tuple):
            raise InputError(f"prompt {place} is a pair of texts", hint="join the two texts to one prompt")
    return [text for text in checked if isinstance(text, str)]


def checked_limit(max_tokens: Any, special: int) -> int:
    """`max_tokens` as an int.

    Raises:
        InputError: `max_tokens` is no integer, or leaves no room for one token beside `special` special tokens.
    """
    minimum = special + 1
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, Integral):
        raise InputError(f"max_tokens is {max_tokens!r}", hint=f"give an integer of at least {minimum}")
    if max_tokens < minimum:
        beside = f", and the tokenizer adds {special} of its own" if special else ""
        raise InputError(f"max_tokens is {int(max_tokens)}{beside}", hint=f"give at least {minimum}")
    return int(max_tokens)


def _checked(text: Any, place: int) -> Text:
    if isinstance(text, str):
        return _encodable(text, place)
    if isinstance(text, Sequence) and not isinstance(text, (bytes, bytearray)):
        if len(text) != 2:
            raise InputError(f"text {place} is {_kind(text)} of {len(text)}, not of two texts", hint=_HINT)
        for part in text:
            if not isinstance(part, str):
                raise InputError(f"text {place} is a pair with {_kind(part)} in it, not of two texts", hint=_HINT)
        return _encodable(text[0], place), _encodable(text[1], place)
    hint = "decode bytes first, with .decode()" if isinstance(text, (bytes, bytearray)) else _HINT
    raise InputError(f"text {place} is {_kind(text)}, not a text", hint=hint)


def _encodable(text: str, place: int) -> str:
    """Return `text`, if UTF-8 can encode it. Half of a surrogate pair is no character and cannot be encoded."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = f"U+{ord(text[error.start]):04X}"
            raise InputError(
                f"text {place} holds half a character ({code}) at {error.start}", hint="read it with its own encoding"
            ) from error
    return text


def _kind(value: Any) -> str:
    if value is None:
        return "None"
    return "a string" if isinstance(value, str) else f"of type {type(value).__name__}"
