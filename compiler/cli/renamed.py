"""Old spellings of options: they work for one release, with a warning that names the new one."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence

ARGUMENT = ""
"""New spelling of an option that became the last positional argument."""

RENAMED: Mapping[str, Mapping[str, str]] = {
    "compile": {"--out": "--output"},
    "calibrate": {"--recipe": ARGUMENT},
    "train": {"--recipe": ARGUMENT},
    "generate": {"--max-tokens": "--max-new-tokens"},
    "bench": {"--data": "--peer-data"},
    "cost": {"--batch": "--batch-size", "--speed": "--speeds"},
}
"""Command → old spelling → new spelling. To be removed in 0.2."""


def with_new_names(command: str, words: Sequence[str]) -> list[str]:
    """The words of a command line, old spellings replaced; each replacement is a warning on stderr."""
    old_to_new = RENAMED.get(command, {})
    replaced: list[str] = []
    positional: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--":  # behind it there are no options
            return [*replaced, word, *rest, *positional]
        old, equals, value = word.partition("=")
        if old not in old_to_new:
            replaced.append(word)
            continue
        new = old_to_new[old]
        _warn(command, old, new)
        if new == ARGUMENT:
            positional += [value] if equals else _next(rest)
        else:
            replaced.append(f"{new}{equals}{value}")
    return [*replaced, *positional]


def _next(words: Iterator[str]) -> list[str]:
    word = next(words, None)
    return [] if word is None else [word]


def _warn(command: str, old: str, new: str) -> None:
    advice = f"use {new}" if new else f"give the value without it, behind the model: trimtab {command} MODEL RECIPE ..."
    print(f"warning: {old} of `trimtab {command}` is deprecated and goes in 0.2; {advice}", file=sys.stderr)
