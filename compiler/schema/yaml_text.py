"""YAML that a user wrote, read strictly: no key twice, and faults with their line."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from trimtab.passes.errors import RecipeError


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which YAML forbids and PyYAML lets pass."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is no string", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        RecipeError: missing, not UTF-8, not YAML, a key twice, or not a mapping; with the line.
    """
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe", hint="give a YAML file, or leave it out for the default recipe")
    try:
        found = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    if not isinstance(found, dict):
        kind = "empty" if found is None else f"a {type(found).__name__}"
        raise RecipeError(f"{path}: is {kind}, not a mapping", hint="begin with a key, such as `passes:`")
    return found


def parse_yaml(text: str, where: str) -> Any:
    """The value that YAML `text` stands for.

    Raises:
        RecipeError: not YAML, or a key twice; names `where` and the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{where}{line}: {getattr(error, 'problem', None) or error}") from error
