"""Token ids of texts and pairs. Encoders cut texts as transformers does, and any number of threads may share one.

The tokenizers library stores the length at which texts are cut in its object, so two threads would change each other's
limit. Here that object never changes: the encoder tokenizes the part of a text that `Cutter` selects, without special
tokens, cuts the tokens, and adds special tokens with the library's post-processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any, NamedTuple, Protocol

import tokenizers
from tokenizers import normalizers

from trimtab.compiler.data.cutting import MAX_CHARACTERS, Cutter
from trimtab.compiler.data.texts import Text
from trimtab.passes.errors import InputError


class Row(NamedTuple):
    """Token ids of one text or pair, and the type of each token."""

    ids: list[int]
    types: list[int]


class _Tokens(NamedTuple):
    """Tokens of a text, or of a part of it."""

    text: str
    tokens: tokenizers.Encoding
    whole: bool


class Encoder(Protocol):
    """Turns texts into token ids. Several threads may call its methods at once."""

    def special_tokens(self, pair: bool) -> int:
        """Number of special tokens that are added to a text, or to a pair."""
        ...

    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that stand for no text."""
        ...

    def encode(self, texts: Sequence[Text], limit: int | None) -> list[Row]:
        """Tokenize `texts`. A row has at most `limit` tokens; the longer text of a pair is cut first."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        ...


class FastEncoder:
    """An encoder that uses the tokenizers library.

    Args:
        inner: the library's tokenizer; this object owns it and changes it.
        from_left: texts that are too long lose their first tokens instead of their last.
        lower_case: add a Lowercase step in front of the normalizer, unless it has one.
    """

    def __init__(self, inner: tokenizers.Tokenizer, *, from_left: bool, lower_case: bool = False) -> None:
        if lower_case:
            _add_lowercase(inner)
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self._side = "left" if from_left else "right"
        self._cutter = Cutter(inner, from_left=from_left)
        self._special = {pair: inner.num_special_tokens_to_add(pair) for pair in (False, True)}

    def special_tokens(self, pair: bool) -> int:
        return self._special[pair]

    def special_ids(self) -> frozenset[int]:
        return frozenset(number for number, token in self._inner.get_added_tokens_decoder().items() if token.special)

    def encode(self, texts: Sequence[Text], limit: int | None) -> list[Row]:
        if limit is None:
            rooms: list[int | None] = [None] * len(texts)
        else:
            rooms = [limit - self._special[not isinstance(text, str)] for text in texts]
        first = self._read([text if isinstance(text, str) else text[0] for text in texts], rooms)
        pairs = [(text[1], room) for text, room in zip(texts, rooms, strict=True) if not isinstance(text, str)]
        second = iter(self._read([text for text, _ in pairs], [room for _, room in pairs], second=True))
        rows = []
        for text, part, room in zip(texts, first, rooms, strict=True):
            other = None if isinstance(text, str) else next(second)
            if room is not None:
                self._cut(part, other, room)
            processed = self._inner.post_process(part.tokens, other and other.tokens)
            rows.append(Row(processed.ids, processed.type_ids))
        return rows

    def _read(self, texts: Sequence[str], rooms: Sequence[int | None], *, second: bool = False) -> list[_Tokens]:
        """Tokenize texts, or parts of them that give more tokens than there is room for.

        Args:
            second: the texts are the second texts of pairs.

        Raises:
            InputError: the tokenizer cannot read a text, or a part of the largest size gives too few tokens.
        """
        encoded_texts: dict[int, _Tokens] = {}
        sizes = [
            [len(text)] if room is None else self._cutter.sizes(room) for text, room in zip(texts, rooms, strict=True)
        ]
        left = list(range(len(texts)))
        while left:
            parts = [self._cutter.part(texts[i], sizes[i].pop(0)) for i in left]
            # A second text follows an empty one, so its tokens have the second text's type, which post-processors keep.
            encoded = self._tokenize([("", part.text) if second else part.text for part in parts])
            for i, part, tokens in zip(left, parts, encoded, strict=True):
                room, kept = rooms[i], self._cutter.kept(part, tokens)
                if part.safe is None or (room is not None and kept > room):
                    encoded_texts[i] = _Tokens(texts[i], tokens, part.safe is None)
                elif not sizes[i]:
                    raise InputError(
                        f"a text has {len(texts[i])} characters, and {len(part.text)} of them, the limit, do not give "
                        f"the {room} tokens that fit",
                        hint="leave out what is no text, such as long runs without spaces",
                    )
            left = [i for i in left if i not in encoded_texts]
        return [encoded_texts[i] for i in range(len(texts))]

    def _tokenize(self, texts: Sequence[Text]) -> list[tokenizers.Encoding]:
        try:  # encode_batch_fast would give every token the type of a first text
            return self._inner.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # the library raises Exception itself
            raise InputError(
                f"the model's tokenizer cannot read a text: {error}", hint="leave out what it does not know"
            ) from error

    def _cut(self, part: _Tokens, other: _Tokens | None, room: int) -> None:
        if other is None:
            part.tokens.truncate(room, direction=self._side)
            return
        counts = len(part.tokens), len(other.tokens)
        # Counts above `room` need not be exact, except that the longer text keeps the odd token of an odd `room`.
        if room % 2 and not (part.whole and other.whole) and min(counts) > room:
            counts = self._lengths(part.text, other.text)
        for each, limit in zip((part, other), _longest_first(*counts, room), strict=True):
            each.tokens.truncate(limit, direction=self._side)

    def _lengths(self, *texts: str) -> tuple[int, int]:
        """Lengths to compare: tokens of both whole texts, or characters if a text is over the limit."""
        if max(map(len, texts)) > MAX_CHARACTERS:
            first, second = map(len, texts)
        else:
            first, second = map(len, self._tokenize(texts))
        return first, second

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._inner.decode(list(ids), skip_special_tokens=True))


def _add_lowercase(inner: tokenizers.Tokenizer) -> None:
    """Make Lowercase the first step of the normalizer, as sentence-transformers does."""
    normalizer: Any = inner.normalizer
    is_sequence = type(normalizer) is normalizers.Sequence
    steps = list(normalizer) if is_sequence else [normalizer] if normalizer is not None else []
    if not any(isinstance(step, normalizers.Lowercase) for step in steps):
        inner.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Number of tokens that each text of a pair keeps, as the tokenizers library divides `room` between them."""
    if first + second <= room:
        return first, second
    short = min(first, second)
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    return (long, short) if first > second else (short, long)


class SlowEncoder:
    """An encoder that uses a transformers tokenizer written in Python. A lock admits one thread at a time.

    Args:
        inner: the transformers tokenizer; this object owns it.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._lock = Lock()

    def special_tokens(self, pair: bool) -> int:
        return int(self._inner.num_special_tokens_to_add(pair=pair))

    def special_ids(self) -> frozenset[int]:
        return frozenset(self._inner.all_special_ids)

    def encode(self, texts: Sequence[Text], limit: int | None) -> list[Row]:
        with self._lock:
            return [self._row(text, limit) for text in texts]

    def _row(self, text: Text, limit: int | None) -> Row:
        # Lists of one text: transformers ignores an empty second text that is a plain string.
        first, second = ([text], None) if isinstance(text, str) else ([text[0]], [text[1]])
        rows = self._inner(first, second, truncation=limit is not None, max_length=limit, return_token_type_ids=True)
        return Row(list(rows["input_ids"][0]), list(rows["token_type_ids"][0]))

    def decode(self, ids: Sequence[int]) -> str:
        with self._lock:
            return str(self._inner.decode(list(ids), skip_special_tokens=True))
