"""Tables of names, each of which stands for a class that is imported when it is asked for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from trimtab.passes.errors import TrimtabError, quoted


def import_named(name: str, known: Mapping[str, str], one: str, many: str, error: type[TrimtabError]) -> Any:
    """What `name` stands for in `known`, a table of name → "module:attribute".

    Args:
        one, many: one of them, and all of them, in messages: "pass", "passes".
        error: is raised if there is no such name; it names the nearest, or all.
    """
    if name not in known:
        near = difflib.get_close_matches(name[:80], list(known), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known {many}: {', '.join(known)}"
        raise error(f"unknown {one} {quoted(name)}", hint=hint)
    module, attribute = known[name].split(":")
    return getattr(import_module(module), attribute)
