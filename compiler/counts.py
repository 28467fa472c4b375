"""Counts that callers give: of samples, of tokens, of threads."""

from __future__ import annotations

from numbers import Integral

from trimtab.passes.errors import InputError


def check_count(name: str, count: object, *, maximum: int | None = None, hint: str | None = None) -> None:
    """Refuse what is no number of things, before work begins whose result would be empty or of something else.

    Args:
        name: name of the argument or option, for the message.

    Raises:
        InputError: `count` is not an integer of at least 1 and at most `maximum`.
    """
    whole = isinstance(count, Integral) and not isinstance(count, bool)
    if not whole or count < 1 or (maximum is not None and count > maximum):  # type: ignore[operator]
        wanted = "an integer of at least 1" if maximum is None else f"an integer from 1 to {maximum}"
        raise InputError(f"{name} is {count!r}, not {wanted}", hint=hint or f"give {name} such a number")
