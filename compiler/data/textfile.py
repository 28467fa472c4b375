"""Texts with optional labels from .txt, .jsonl and .tsv files, plain or packed with gzip."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trimtab.passes.errors import DataError

Label = int | str | None
Example = tuple[str, Label]

_TEXT_KEYS = ("text", "sentence")


def read_texts(path: Path, seen: Callable[[bytes], object] | None = None) -> Iterator[Example]:
    """(text, label or None) of each sample, read as asked for: memory does not grow with the file.

    Args:
        path: a file of texts (the kinds are listed in `dataset.py`).
        seen: is called with the bytes of each line, unpacked; for hashing.

    Raises:
        DataError: not readable, not UTF-8, malformed, or of an unknown kind; names the file and the line.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])
    readers = {".txt": _parse_txt, ".jsonl": _parse_jsonl, ".tsv": _parse_tsv}
    if kind not in readers:
        raise DataError(
            f"{path}: data of unknown kind {kind!r}",
            hint=f"known kinds: {', '.join(readers)}, each also with .gz, and .npz",
        )
    for number, text, label in readers[kind](path, _lines(path, seen)):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{path} line {number}: the text is {'empty' if text == '' else repr(text)[:40]}")
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            raise DataError(f"{path} line {number}: the text holds half a surrogate pair, which is no character")
        if isinstance(label, bool) or not isinstance(label, int | str | None):
            raise DataError(f"{path} line {number}: label {label!r} is neither an integer nor a class name")
        yield text, label


def _lines(path: Path, seen: Callable[[bytes], object] | None) -> Iterator[tuple[int, str]]:
    """(number from 1, text without its end) of each line."""
    number = 0
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if seen is not None:
                    seen(line)
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        hint = "convert it, for example with `iconv -f latin1 -t utf-8`"
        raise DataError(f"{path} line {number}: not UTF-8 ({error.reason})", hint=hint) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read after line {number} ({error})") from error


def _parse_txt(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str, None]]:
    return ((number, line, None) for number, line in lines if line.strip())


def _parse_jsonl(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, Any, Any]]:
    for number, line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} line {number}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise DataError(f"{path} line {number}: not a JSON object", hint='write {"text": "..."} on each line')
        key = next((key for key in _TEXT_KEYS if key in record), None)
        if key is None:
            keys = ", ".join(map(repr, record)) or "none"
            raise DataError(f"{path} line {number}: no 'text' among its keys ({keys})", hint="name the text 'text'")
        yield number, record[key], record.get("label")


def _parse_tsv(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str, Label]]:
    text_column, label_column = 0, None
    for number, line in lines:
        cells = line.split("\t")
        if number == 1:
            names = [cell.strip().lower() for cell in cells]
            key = next((key for key in _TEXT_KEYS if key in names), None)
            if key is not None:
                text_column, label_column = names.index(key), names.index("label") if "label" in names else None
                continue
        if len(cells) <= max(text_column, label_column or 0):
            raise DataError(f"{path} line {number}: {len(cells)} columns, fewer than the header's")
        label = "" if label_column is None else cells[label_column].strip()
        yield number, cells[text_column], int(label) if label.removeprefix("-").isdecimal() else label or None
