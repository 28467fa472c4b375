"""Texts and pairs of texts, with optional labels, from .txt, .jsonl and .tsv files, plain or packed with gzip."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from trimtab.compiler.data.limits import MAX_LINE, MAX_NAME, MAX_UNPACKED
from trimtab.compiler.data.texts import Text
from trimtab.compiler.schema.json_text import parse_json
from trimtab.passes.errors import DataError, short
from trimtab.passes.os_errors import unreadable


class WholeCell(int):
    """A whole number in a .tsv cell, with the cell's text, which may also be the name of a class."""

    text: str

    def __new__(cls, text: str) -> WholeCell:
        number = super().__new__(cls, text)
        number.text = text
        return number


class ScoreCell(float):
    """A number with a fraction or an exponent in a .tsv cell, with the cell's text."""

    text: str

    def __new__(cls, text: str) -> ScoreCell:
        number = super().__new__(cls, text)
        number.text = text
        return number


Label = int | float | str | tuple[str, ...] | None
"""A class (its number or name), a score, the names of all classes that apply to a text, or no label."""

Example = tuple[Text, Label]

PAIRS = (
    ("text", "text_pair"), ("sentence", "text_pair"), ("sentence1", "sentence2"), ("text", "sentence2"),
    ("query", "document"), ("query", "passage"), ("question1", "question2"), ("premise", "hypothesis"),
    ("question", "sentence"),
)  # fmt: skip
"""Names of the two texts of a pair, as in well-known data sets. The first pair of names that a file has counts. If the
file has "text", only pairs of names that begin with "text" are considered."""

_TEXT_KEYS = ("text", "sentence")
_LABEL, _SCORE = "label", "score"
_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_DECIMAL = re.compile(r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)")

_WHOLE, _CELL, _LIST = "a whole number", "a number", "a list of class names"

_Row = tuple[int, Any, Any]  # line number from 1, unchecked text or pair, unchecked label


def read_texts(path: Path, seen: Callable[[bytes], object] | None = None) -> Iterator[Example]:
    """Yield each (text or pair of texts, label or None). Lines are read one by one, so memory does not grow.

    Args:
        path: a file of texts (the kinds are listed in `dataset.py`).
        seen: function that is called with the unpacked bytes of each line, for hashing.

    Raises:
        DataError: the file is not readable, not UTF-8, malformed, or of an unknown kind; or it mixes pairs with single
            texts, or labels of several kinds. Names the file and the line.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])
    readers = {".txt": _parse_txt, ".jsonl": _parse_jsonl, ".tsv": _parse_tsv}
    if kind not in readers:
        raise DataError(
            f"{path}: data of unknown kind {kind!r}",
            hint=f"known kinds: {', '.join(readers)}, each also with .gz, and .npz",
        )
    consistency = _Consistency(path)
    for number, text, label in readers[kind](path, _lines(path, seen)):
        where = f"{path} line {number}"
        checked = _checked_text(text, where)
        label = _checked_label(label, where)
        consistency.check(number, checked, label)
        yield checked, label


class _Consistency:
    """Checks that all samples of a file are of one kind, while they are read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._first: tuple[int, bool] | None = None
        self._kinds: dict[int, str] = {}  # number of the first line → kind of its label

    def check(self, number: int, text: Text, label: Label) -> None:
        """Compare the sample on line `number` with the samples before it."""
        where = f"{self._path} line {number}"
        is_pair = isinstance(text, tuple)
        if self._first is None:
            self._first = (number, is_pair)
        elif is_pair != self._first[1]:
            this, other = ("a pair of texts", "a single text") if is_pair else ("a single text", "a pair of texts")
            raise DataError(
                f"{where}: {this}, where line {self._first[0]} has {other}",
                hint="put pairs and single texts into files of their own",
            )
        if (kind := _kind(label)) is None:
            return
        clash = next((line for line, other in self._kinds.items() if not _fit(kind, other)), None)
        if clash is not None:
            raise DataError(
                f"{where}: the label is {kind}, where line {clash} has {self._kinds[clash]}",
                hint="labels of one file are all classes, all scores (numbers), or all lists of class names",
            )
        if kind not in self._kinds.values():
            self._kinds[number] = kind


def _kind(label: Label) -> str | None:
    if label is None:
        return None
    kinds = {ScoreCell: _CELL, int: _WHOLE, float: "a score", str: "a class name", tuple: _LIST}
    return next(name for kind, name in kinds.items() if isinstance(label, kind))


def _fit(kind: str, other: str) -> bool:
    """Whether labels of both kinds may be in one file. Whole numbers and numbers in cells are classes or scores."""
    return kind == other or (not {_WHOLE, _CELL}.isdisjoint((kind, other)) and _LIST not in (kind, other))


def _checked_text(text: Any, where: str) -> Text:
    """Check that `text` is a text or a pair of texts, and return it."""
    parts = text if isinstance(text, tuple) else (text,)
    for part, which in zip(parts, ("the text", "the second text"), strict=False):
        if not isinstance(part, str) or not part.strip():
            raise DataError(
                f"{where}: {which} is {'empty' if part == '' else repr(part)[:40]}",
                hint="give each sample a text, or remove the sample",
            )
        if not part.isascii() and any("\ud800" <= char <= "\udfff" for char in part):
            raise DataError(
                f"{where}: {which} holds half a surrogate pair, which is no character",
                hint="read the text with its own encoding before it is saved",
            )
    return text


def _checked_label(label: Any, where: str) -> Label:
    names = label if isinstance(label, list) else [label]
    longest = max((len(name) for name in names if isinstance(name, str)), default=0)
    if longest > MAX_NAME:
        raise DataError(
            f"{where}: label {short(repr(label), 40)} has {longest} characters, over the limit of {MAX_NAME}",
            hint="give the name or the number of a class",
        )
    if isinstance(label, list) and all(isinstance(name, str) for name in label):
        if len(set(label)) < len(label):
            raise DataError(
                f"{where}: label {short(repr(label), 40)} names a class twice", hint="name each class of the text once"
            )
        return tuple(label)
    if isinstance(label, list):
        raise DataError(
            f"{where}: label {short(repr(label), 40)} is a list of other things than class names",
            hint='write the names of all classes that the text has, such as "label": ["toxic", "spam"]',
        )
    if isinstance(label, bool) or not isinstance(label, int | float | str | None):
        raise DataError(
            f"{where}: label {short(repr(label), 40)} is neither a number nor a class name, nor a list of class names",
            hint='such as "label": 1, "label": "spam" or "label": ["toxic", "spam"]',
        )
    if isinstance(label, float) and not math.isfinite(label):
        raise DataError(
            f"{where}: label {label} is no finite number", hint="give a number, or null where there is no label"
        )
    if isinstance(label, int) and abs(label) >= 1 << 63:
        raise DataError(
            f"{where}: label {short(repr(label), 40)} is no number of 64 bits",
            hint="give the number of a class, or a score",
        )
    return label


def _lines(path: Path, seen: Callable[[bytes], object] | None) -> Iterator[tuple[int, str]]:
    """Yield each line as (number from 1, text without the line end)."""
    number = unpacked = 0
    packed = path.suffix.lower() == ".gz"
    try:
        with gzip.open(path, "rb") if packed else open(path, "rb") as file:
            while line := file.readline(MAX_LINE + 1):
                number, unpacked = number + 1, unpacked + len(line)
                if len(line) > MAX_LINE:
                    raise DataError(f"{path} line {number}: over the limit of {MAX_LINE} bytes", hint="split the text")
                if packed and unpacked > MAX_UNPACKED:
                    raise DataError(
                        f"{path} line {number}: unpacks to more than the limit of {MAX_UNPACKED} bytes",
                        hint="unpack it yourself with gunzip: files that are not packed may have any size",
                    )
                if seen is not None:
                    seen(line)
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        hint = "convert it, for example with `iconv -f latin1 -t utf-8`"
        raise DataError(f"{path} line {number}: not UTF-8 ({error.reason})", hint=hint) from error
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(path, error, DataError) from error
        reason = "truncated or damaged" if packed else "read error"
        raise DataError(f"{path}: cannot be read after line {number} ({reason})", hint="write it again") from error


def _keys(names: Collection[str]) -> tuple[str | None, str | None, str]:
    """Find the names of the text, of the second text (None without one) and of the label in `names`."""
    for first, second in PAIRS:
        if first in names and second in names and ("text" not in names or first == "text"):
            return first, second, _LABEL if _LABEL in names else _SCORE
    return next((key for key in _TEXT_KEYS if key in names), None), None, _LABEL


def _parse_txt(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[_Row]:
    return ((number, line, None) for number, line in lines if line.strip())


def _parse_jsonl(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[_Row]:
    for number, line in lines:
        record = parse_json(line, f"{path} line {number}", DataError)
        if not isinstance(record, dict):
            raise DataError(f"{path} line {number}: not a JSON object", hint='write {"text": "..."} on each line')
        first, second, label = _keys([key for key, value in record.items() if value is not None or key in _TEXT_KEYS])
        if first is None:
            keys = ", ".join(map(repr, record)) or "none"
            raise DataError(
                f"{path} line {number}: no 'text' among its keys ({short(keys, 200)})",
                hint="name the text 'text', and of a pair the second one 'text_pair'",
            )
        text = record[first] if second is None else (record[first], record[second])
        yield number, text, record.get(label)


def _parse_tsv(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[_Row]:
    first, second, labels = 0, None, None  # column numbers
    for number, line in lines:
        cells = line.split("\t")
        if number == 1:
            names = [cell.strip().lower() for cell in cells]
            text, pair, label = _keys(names)
            if text is not None:
                first, second = names.index(text), names.index(pair) if pair is not None else None
                labels = names.index(label) if label in names else None
                continue
        if len(cells) <= max(first, second or 0, labels or 0):
            raise DataError(
                f"{path} line {number}: {len(cells)} columns, fewer than the header's",
                hint="separate columns by tabs, and fill up missing ones",
            )
        label = "" if labels is None else cells[labels].strip()
        yield number, cells[first] if second is None else (cells[first], cells[second]), _parse_cell(label)


def _parse_cell(label: str) -> Label:
    """Parse a cell as a number that keeps the cell's text, or as a class name (also `007`, `+1`, ints over 64 bits)."""
    if _INTEGER.fullmatch(label) and len(label) <= 20 and abs(int(label)) < 1 << 63:
        return WholeCell(label)
    if _DECIMAL.fullmatch(label) and math.isfinite(score := ScoreCell(label)):
        return score
    return label or None
