"""Options of commands that run a build at a chosen speed."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from trimtab.passes.errors import InputError


def parse_dials(given: Sequence[str] | None) -> dict[str, float]:
    """["exit_threshold=0.2"] → {"exit_threshold": 0.2}.

    Raises:
        InputError: not of that form, not a number, or a dial is given twice.
    """
    dials: dict[str, float] = {}
    for setting in given or ():
        name, equals, text = setting.partition("=")
        try:
            dials[_new(name, dials, "--dial")] = float(text)
        except ValueError:
            equals = ""
        if not equals:
            raise InputError(f"--dial {setting}: not of the form name=number", hint="such as exit_threshold=0.2")
    return dials


def parse_speeds(text: str | None) -> list[float]:
    """ "0,0.5,1" → [0.0, 0.5, 1.0].

    Raises:
        InputError: not numbers.
    """
    return [] if text is None else _numbers(text, f"--speeds {text}", "such as 0,0.5,1")


def parse_grid(given: Sequence[str] | None) -> dict[str, list[float]]:
    """["prune=0,0.5,1"] → {"prune": [0.0, 0.5, 1.0]}.

    Raises:
        InputError: not of that form, not numbers, or a dial is given twice.
    """
    values: dict[str, list[float]] = {}
    for setting in given or ():
        name, _, text = setting.partition("=")
        values[_new(name, values, "--grid")] = _numbers(text, f"--grid {setting}", "such as prune=0,0.5,1")
    return values


def _new(name: str, known: Collection[str], option: str) -> str:
    """The name of a dial that `option` was not given for before."""
    name = name.strip()
    if name in known:
        raise InputError(f"{option} {name}=...: given twice", hint="give each dial once")
    return name


def _numbers(text: str, where: str, example: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{where}: not numbers with commas between them", hint=example) from error
