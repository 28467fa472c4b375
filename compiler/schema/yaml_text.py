"""A user's YAML, read strictly and within limits: a key may not repeat, and faults have a line number.

PyYAML has no limits: it recurses for each level of nesting, and aliases of aliases expand to any number of values.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from trimtab.passes.errors import RecipeError, short
from trimtab.passes.os_errors import no_file, unreadable

MAX_BYTES = 100_000
"""Maximum size of a recipe. Recipes of the examples have 1 KB."""

MAX_DEPTH = 32
"""Maximum nesting of lists and mappings. Recipes have five levels."""

MAX_VALUES = 10_000
"""Maximum number of values and keys; those of an alias count at each use."""

_TAGS = {f"tag:yaml.org,2002:{name}": name for name in ("null", "bool", "int", "float", "str", "seq", "map")}
"""Types that a recipe may hold: those of JSON. An unquoted date has another type."""

_COLLECTIONS = {"seq": yaml.SequenceNode, "map": yaml.MappingNode}
"""Type → the form in which it is written; other types are scalars. A tag may claim another form's type."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses repeated keys, which YAML forbids and PyYAML accepts, and values of other types."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag not in _TAGS:
            what = f"{short(node.value)!r} is read as" if isinstance(node, yaml.ScalarNode) else "this is"
            raise _fault(f"{what} a {short(node.tag.rsplit(':', 1)[-1])}; put text in quotes", node)
        if not isinstance(node, _COLLECTIONS.get(_TAGS[node.tag], yaml.ScalarNode)):
            raise _fault(f"this is no {_TAGS[node.tag]}, though its tag says so", node)
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, TypeError, OverflowError) as error:  # the scalar does not match its tag
            raise _fault(f"{short(str(node.value))!r} is no {_TAGS[node.tag]}", node) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _fault(f"key {short(str(key))} is no string", key_node)
            if key in seen:
                raise _fault(f"key {short(key)!r} is given twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        RecipeError: the file is missing, over a limit, not UTF-8, not YAML, not a mapping, or has a repeated key; names
            the line.
    """
    if not path.is_file():
        raise no_file(path, RecipeError, "recipe", hint="give a YAML file, or no recipe for the default one")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        value = parse_yaml(content.decode(), str(path))
    except OSError as error:
        raise unreadable(path, error, RecipeError) from error
    except UnicodeDecodeError as error:
        if len(content) > MAX_BYTES:  # the content may end inside a character
            raise _too_large(str(path)) from error
        raise RecipeError(
            f"{path}: is not UTF-8 text, from byte {error.start} on",
            hint="give a YAML file; `trimtab passes` lists passes",
        ) from error
    if not isinstance(value, dict):
        kind = "empty" if value is None else f"a {type(value).__name__}"
        raise RecipeError(f"{path}: is {kind}, not a mapping", hint="begin with a key, such as `passes:`")
    return value


def parse_yaml(text: str, where: str) -> Any:
    """Parse the YAML `text`.

    Raises:
        RecipeError: `text` is over a limit, not YAML, or has a repeated key or a value of another type than JSON's;
            names `where` and the line.
    """
    if len(text) > MAX_BYTES:
        raise _too_large(where)
    try:
        _check_nesting(text)
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_aliases(node)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{where}{line}: {short(getattr(error, 'problem', None) or str(error), 200)}") from error


def _too_large(where: str) -> RecipeError:
    return RecipeError(f"{where}: is larger than {MAX_BYTES} bytes", hint="a recipe is a short YAML file; is this one?")


def _fault(problem: str, node: yaml.Node) -> ConstructorError:
    return ConstructorError(None, None, problem, node.start_mark)


def _check_nesting(text: str) -> None:
    """Check depth and number of values on the parser's events, one at a time; composing nodes would recurse."""
    depth = values = 0
    section = ""  # the recipe's top-level key at the parser's position
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.ScalarEvent) and depth == 1:
            section = f"{short(event.value)}: "
        values += isinstance(event, yaml.NodeEvent)
        for count, limit, what in ((depth, MAX_DEPTH, "levels of nesting"), (values, MAX_VALUES, "values")):
            if count > limit:
                problem = f"{section}there are more than {limit} {what}"
                raise ConstructorError(None, None, problem, event.start_mark)  # type: ignore[arg-type]


def _check_aliases(root: yaml.Node) -> None:
    """Count the values at each use of an alias. A value that contains itself is refused."""
    counts: dict[int, int | None] = {}  # None: being counted
    stack: list[tuple[yaml.Node, Iterator[yaml.Node]]] = [(root, _parts(root))]
    counts[id(root)] = None
    while stack:
        node, pending = stack[-1]
        for part in pending:
            if id(part) not in counts:
                counts[id(part)] = None
                stack.append((part, _parts(part)))
                break
            if counts[id(part)] is None:
                raise _fault("this value holds itself, by an alias", part)
        else:
            stack.pop()
            count = 1 + sum(counts[id(part)] or 0 for part in _parts(node))
            if count > MAX_VALUES:
                raise _fault(f"its aliases stand for more than {MAX_VALUES} values", node)
            counts[id(node)] = count


def _parts(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from (key, value)
