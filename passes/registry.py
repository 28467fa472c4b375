"""Tables of names and classes. A class is imported when its name is looked up."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from trimtab.passes.errors import TrimtabError, quoted


def import_named(name: str, table: Mapping[str, str], one: str, many: str, error: type[TrimtabError]) -> Any:
    """Import the entry `name` of `known`, a table of name → "module:attribute".

    Args:
        one, many: singular and plural of the entries in messages: "pass", "passes".
        error: class of the error for an unknown name. The hint lists the nearest name, or all names.
    """
    if name not in table:
        near = difflib.get_close_matches(name[:80], list(table), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known {many}: {', '.join(table)}"
        raise error(f"unknown {one} {quoted(name)}", hint=hint)
    module, attribute = table[name].split(":")
    return getattr(import_module(module), attribute)
