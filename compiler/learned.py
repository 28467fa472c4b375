"""Errors about weights that no training has learned yet name the command that learns them, with the user's paths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trimtab.passes.errors import NotLearnedError, TrimtabError


@contextmanager
def remedies(
    *, model: Any = None, recipe: Any = None, settings: Sequence[str] = (), data: Any = None, profile: Any = None
) -> Iterator[None]:
    """Put the user's paths into the hint of a NotLearnedError, or into that of the pass error that it caused.

    Arguments that are no paths, such as a Recipe or a Source, keep their placeholder.

    Args:
        settings: changes to the recipe, "pass.option=value".
    """
    try:
        yield
    except TrimtabError as error:
        cause = error if isinstance(error, NotLearnedError) else error.__cause__
        if isinstance(cause, NotLearnedError):
            arguments = {"model": model, "recipe": recipe, "data": data, "profile": profile}
            paths = {key: value for key, value in arguments.items() if isinstance(value, str | Path)}
            error.hint = cause.remedy(settings=settings, **paths)
        raise
