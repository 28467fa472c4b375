"""Token ids of texts and pairs, cut as transformers cuts them, by a tokenizer that any number of threads share.

The tokenizers library keeps the length at which texts are cut inside of its object, so two threads would cut each
other's texts. Here its object never changes: texts are tokenized whole and without special tokens, then cut, and get
special tokens by its own post-processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any, NamedTuple, Protocol

import tokenizers
from tokenizers import normalizers

from trimtab.compiler.data.texts import Text
from trimtab.passes.errors import InputError


class Row(NamedTuple):
    """Token ids of one text or pair, and the type of each token."""

    ids: list[int]
    types: list[int]


class Encoder(Protocol):
    """Makes token ids. Its methods may be called from several threads at once."""

    def special_tokens(self, pair: bool) -> int:
        """How many tokens are added to a text, or to a pair."""
        ...

    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that stand for no text."""
        ...

    def encode(self, texts: Sequence[Text], limit: int | None) -> list[Row]:
        """Tokenize; a row has at most `limit` tokens, and of a pair the longer text is cut first."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        ...


class FastEncoder:
    """By the tokenizers library.

    Args:
        inner: belongs to this object from now on.
        from_left: texts lose their first tokens where they are too long, and not their last.
        lower_case: letters become lower case first, unless the tokenizer does that by itself.
    """

    def __init__(self, inner: tokenizers.Tokenizer, *, from_left: bool, lower_case: bool = False) -> None:
        if lower_case:
            _lower(inner)
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self._side = "left" if from_left else "right"
        self._special = {pair: inner.num_special_tokens_to_add(pair) for pair in (False, True)}

    def special_tokens(self, pair: bool) -> int:
        return self._special[pair]

    def special_ids(self) -> frozenset[int]:
        return frozenset(number for number, token in self._inner.get_added_tokens_decoder().items() if token.special)

    def encode(self, texts: Sequence[Text], limit: int | None) -> list[Row]:
        pairs = [text for text in texts if not isinstance(text, str)]
        first = self._tokenize([text if isinstance(text, str) else text[0] for text in texts])
        # Behind an empty text, so that tokens have the type of a pair's second text, which post-processors may keep.
        second = iter(self._tokenize([("", text) for _, text in pairs]) if pairs else [])
        rows = []
        for text, tokens in zip(texts, first, strict=True):
            other = None if isinstance(text, str) else next(second)
            if limit is not None:
                self._cut(tokens, other, limit - self._special[other is not None])
            whole = self._inner.post_process(tokens, other)
            rows.append(Row(whole.ids, whole.type_ids))
        return rows

    def _tokenize(self, texts: Sequence[Text]) -> list[tokenizers.Encoding]:
        try:  # not encode_batch_fast, which gives every token the type of a first text
            return self._inner.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # the library raises Exception itself
            raise InputError(
                f"the model's tokenizer cannot read a text: {error}", hint="leave out what it does not know"
            ) from error

    def _cut(self, tokens: tokenizers.Encoding, other: tokenizers.Encoding | None, room: int) -> None:
        if other is None:
            tokens.truncate(room, direction=self._side)
            return
        for part, most in zip((tokens, other), _longest_first(len(tokens), len(other), room), strict=True):
            part.truncate(most, direction=self._side)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._inner.decode(list(ids), skip_special_tokens=True))


def _lower(inner: tokenizers.Tokenizer) -> None:
    """Let the normalizer begin with Lowercase, as sentence-transformers does."""
    normalizer: Any = inner.normalizer
    whole = type(normalizer) is normalizers.Sequence
    steps = list(normalizer) if whole else [normalizer] if normalizer is not None else []
    if not any(isinstance(step, normalizers.Lowercase) for step in steps):
        inner.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of a pair's texts stay, as the tokenizers library shares `room` among them."""
    if first + second <= room:
        return first, second
    short = min(first, second)
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    return (long, short) if first > second else (short, long)


class SlowEncoder:
    """By a tokenizer of transformers that is written in Python: one thread at a time, as Python itself runs.

    Args:
        inner: belongs to this object from now on.
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
        # As lists of one: given alone, an empty second text counts as none.
        first, second = ([text], None) if isinstance(text, str) else ([text[0]], [text[1]])
        rows = self._inner(first, second, truncation=limit is not None, max_length=limit, return_token_type_ids=True)
        return Row(list(rows["input_ids"][0]), list(rows["token_type_ids"][0]))

    def decode(self, ids: Sequence[int]) -> str:
        with self._lock:
            return str(self._inner.decode(list(ids), skip_special_tokens=True))
