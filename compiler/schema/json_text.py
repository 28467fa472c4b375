"""JSON of other programs, read within limits of size and nesting, and validated against a schema.

Triton models carry this module, so it imports only trimtab's errors.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.passes.errors import TrimtabError, short
from trimtab.passes.os_errors import unreadable

MAX_BYTES = 32 << 20
"""Maximum size of a JSON file. The index of a model of a thousand shards has 10 MB."""

MAX_DEPTH = 64
"""Maximum nesting of lists and objects."""

AGAIN = "download or save the model again"

Schema = type | Sequence[Any] | Mapping[str, Any]
"""The type of a value: a type of JSON; `[schema]`: a list of `schema`; `{"*": schema}`: an object of `schema`;
`{"key": schema}`: an object in which `key`, if it exists, has `schema` or is null, and other keys are free."""

_NAMES = {str: "a string", int: "a whole number", bool: "true or false", float: "a number"}


def read_json(path: Path, error: type[TrimtabError], schema: Schema, *, hint: str = AGAIN) -> Any:
    """The content of a JSON file.

    Args:
        error: type of the error that is raised.
        schema: schema of the content.

    Raises:
        error: the file is missing, over a limit, not JSON, or does not match `schema`; names the file and the path of
            the value.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path}: is not a regular file", hint=hint)
        if status.st_size > MAX_BYTES:
            raise error(f"{path}: has {status.st_size} bytes, over the limit of {MAX_BYTES}", hint=hint)
        content = path.read_bytes()
    except OSError as fault:
        raise unreadable(path, fault, error) from fault
    except ValueError as fault:
        raise error(f"{path}: no file can have this name", hint=hint) from fault
    value = parse_json(content, str(path), error, hint=hint)
    if (wrong := mismatch(value, schema)) is not None:
        raise error(f"{path}: {wrong}", hint=hint)
    return value


def optional_json(path: Path, error: type[TrimtabError], schema: Schema, *, hint: str = AGAIN) -> Any:
    """Like `read_json`, for an object; {} if the file does not exist."""
    return read_json(path, error, schema, hint=hint) if os.path.isfile(path) else {}


def parse_json(content: bytes | str, where: str, error: type[TrimtabError], *, hint: str | None = None) -> Any:
    """Parse JSON.

    Raises:
        error: `content` is not UTF-8, not JSON, nested too deep, or has half a surrogate pair; begins with `where`.
    """
    deep = f"nested deeper than {MAX_DEPTH}"
    try:
        value = json.loads(content.decode("utf-8-sig") if isinstance(content, bytes) else content)
        reason = _unfit(value, deep)
    except json.JSONDecodeError as fault:
        line = f"line {fault.lineno}, " if fault.lineno > 1 else ""
        reason = f"not JSON ({fault.msg} at {line}column {fault.colno})"
    except UnicodeDecodeError as fault:
        reason = f"not JSON (not UTF-8 at byte {fault.start})"
    except RecursionError:
        reason = deep
    except ValueError:  # Python does not convert integers of thousands of digits
        reason = "holds an integer of thousands of digits"
    if reason is not None:
        raise error(f"{where}: {reason}", hint=hint)
    return value


def mismatch(value: Any, schema: Schema) -> str | None:
    """The first mismatch of `value` with `schema`: its path, the expected type and the value; None if it matches."""
    return _mismatch(value, schema, "")


def _mismatch(value: Any, schema: Any, path: str) -> str | None:
    if isinstance(schema, type):
        fits = isinstance(value, (int, float) if schema is float else schema)
        if fits and (schema is bool or not isinstance(value, bool)):
            return None
        return _expected(_NAMES[schema], value, path)
    if isinstance(schema, Mapping):
        if not isinstance(value, dict):
            return _expected("an object", value, path)
        named = [(key, inner) for key, inner in schema.items() if key != "*" and value.get(key) is not None]
        others = [(key, schema["*"]) for key in value if key not in schema] if "*" in schema else []
        parts = ((value[key], kind, f"{path}.{short(key)}" if path else short(key)) for key, kind in named + others)
    else:
        if not isinstance(value, list):
            return _expected("a list", value, path)
        parts = ((item, schema[0], f"{path}[{place}]") for place, item in enumerate(value))
    return next((wrong for part in parts if (wrong := _mismatch(*part)) is not None), None)


def _expected(kind: str, value: Any, path: str) -> str:
    return f"{path + ': ' if path else ''}should be {kind}, not {short(json.dumps(value, default=str))}"


def _unfit(value: Any, deep: str) -> str | None:
    """What makes a value unusable, or None. Visits its parts layer by layer, without recursion."""
    layer = [value]
    for depth in range(MAX_DEPTH + 1):
        containers = [part for part in layer if isinstance(part, dict | list)]
        if containers and depth == MAX_DEPTH:
            return deep
        texts = [part for part in layer if isinstance(part, str)]
        texts += [key for part in containers if isinstance(part, dict) for key in part]
        if any("\ud800" <= char <= "\udfff" for text in texts if not text.isascii() for char in text):
            return "holds half a surrogate pair, which is no character"
        if not containers:
            break
        layer = [inner for part in containers for inner in _inner(part)]
    return None


def _inner(part: dict[str, Any] | list[Any]) -> list[Any]:
    return list(part.values()) if isinstance(part, dict) else part
