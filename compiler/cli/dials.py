"""Options of commands that run a build at a chosen speed."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.passes.errors import InputError

SPEED_HELP = "0: as exact as the build is, to 1: as fast as its dials go. Default: the dials' defaults."
DIAL_HELP = "name=value, beside or instead of --speed; may be given again."


def parse_dials(given: Sequence[str] | None) -> dict[str, float]:
    """["exit_threshold=0.2"] → {"exit_threshold": 0.2}.

    Raises:
        InputError: not of that form, or not a number.
    """
    dials = {}
    for setting in given or ():
        name, equals, text = setting.partition("=")
        try:
            dials[name.strip()] = float(text)
        except ValueError:
            equals = ""
        if not equals:
            raise InputError(f"--dial {setting}: not of the form name=number", hint="such as exit_threshold=0.2")
    return dials
