"""Limits how much of a long text is tokenized when only its first (or last) tokens are kept.

The kept token ids equal those of the whole text. A token depends on its own word and on the characters near it: added
tokens may begin in one word and end in another, and normalizers compose a few characters. So a part of the text that
extends some characters beyond a word's end yields the same tokens up to that end as the whole text. This holds where no
token spans the end of a word: either the pre-tokenizer splits at words, or the vocabulary has no such token. Other
tokenizers receive whole texts.

Triton models include a copy of this module.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import tokenizers

MAX_CHARACTERS = 1 << 20
"""Maximum number of characters of a text that are tokenized; the maximum is larger if more tokens are kept."""

_PER_TOKEN = 32  # characters of the first part, for each token that is kept
_GROWTH = 4  # factor of the next part's size, where a part gave too few tokens
_MARGIN = 64  # characters behind a word's end that may change its tokens, in addition to the longest added token
_WORD_END = re.compile(r"\S(?=[ \n])")
_SPANNING = re.compile("[^ \n\u2581\u0120\u010a][ \n\u2581\u0120\u010a]")  # as byte-level and SentencePiece write them
_SAMPLES = ("a b", "a\nb", "1 2", ". .", "a  b")


class Part(NamedTuple):
    """A part of a text.

    Attributes:
        text: the part.
        safe: character offset in `text`: tokens on the kept side of it are those of the whole text. None if the part is
            the whole text.
    """

    text: str
    safe: int | None


class Cutter:
    """Takes parts of texts for one tokenizer.

    Args:
        from_left: texts that are too long lose their first tokens instead of their last.
    """

    def __init__(self, inner: tokenizers.Tokenizer, *, from_left: bool) -> None:
        added = inner.get_added_tokens_decoder().values()
        self._margin = _MARGIN + max((len(token.content) for token in added), default=0)
        self._from_left = from_left
        self._can_cut = _splits_words(inner) or not any(map(_SPANNING.search, inner.get_vocab(False)))

    def sizes(self, room: int) -> list[int]:
        """Sizes of parts, in characters, for `room` tokens. Each is tried if the one before gives too few tokens."""
        first = _PER_TOKEN * room + 2 * self._margin
        limit = max(MAX_CHARACTERS, first)
        sizes = [first] if self._can_cut and first < limit else []
        while sizes and sizes[-1] * _GROWTH < limit:
            sizes.append(sizes[-1] * _GROWTH)
        return [*sizes, limit]

    def part(self, text: str, size: int) -> Part:
        """Take at most `size` characters of `text`, from the side that is kept."""
        if len(text) <= size:
            return Part(text, None)
        if self._from_left:
            text = text[-size:]
            end = _WORD_END.search(text, self._margin) if self._can_cut else None
            return Part(text, end.end() if end else size)
        text = text[:size]
        last = max(text.rfind(space, 0, size - self._margin) for space in " \n") if self._can_cut else 0
        return Part(text, len(text[: max(last, 0)].rstrip()))

    def kept(self, part: Part, tokens: tokenizers.Encoding) -> int:
        """Count the tokens of `part`, from the side that is kept, that are also tokens of the whole text."""
        if part.safe is None:
            return len(tokens)
        if self._from_left:
            spans, inside = tokens.offsets[::-1], lambda span: span[0] >= part.safe
        else:
            spans, inside = tokens.offsets, lambda span: span[1] <= part.safe
        return next((count for count, span in enumerate(spans) if not inside(span)), len(spans))


def _splits_words(inner: tokenizers.Tokenizer) -> bool:
    """Whether the pre-tokenizer splits a text at its spaces and line ends."""
    if inner.pre_tokenizer is None:
        return False
    for sample in _SAMPLES:
        text = inner.normalizer.normalize_str(sample) if inner.normalizer is not None else sample
        pieces = [piece for piece, _ in inner.pre_tokenizer.pre_tokenize_str(text)]
        if any(sample[0] in piece[:-1] and sample[-1] in piece[1:] and len(piece) > 2 for piece in pieces):
            return False
    return True
