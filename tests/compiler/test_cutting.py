"""Of long texts only a part is tokenized, and the ids are those of the whole text, whatever the tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from seeds import seeded
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from trimtab.compiler.data.cutting import MAX_CHARACTERS, Cutter
from trimtab.compiler.data.encoding import FastEncoder
from trimtab.compiler.data.texts import Text
from trimtab.passes.errors import InputError

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
LETTERS = [
    "a",
    "ab",
    "ba",
    "aab",
    "\u00e9",
    "e\u0301",
    "\u00df",
    "I\u0307",
    "7",
    "123",
    ".",
    ",",
    "...",
    "'s",
    "\u4f60\u597d",
    "\u3002",
    "\U0001f600",
]
SPACES = [" ", " ", " ", "  ", "\n", ".\n", "\t", "\u00a0", "\u3000", "\r\n", " \n "]
LLAMA3 = Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def text_of(rng: np.random.Generator, length: int, odd: float = 0.03) -> str:
    """Words of up to ten pieces; now and then a special token, a long word, or a long gap."""
    found, size = [], 0
    while size < length:
        word = "".join(rng.choice(LETTERS, rng.integers(1, 10)))
        if rng.random() < odd:
            word = str(rng.choice(["<mask>", "a<mask>b", "</s>", "ab" * 60, word + " " * 90, "7" * 70, "New York"]))
        found += [word, str(rng.choice(SPACES))]
        size += len(word) + 1
    return "".join(found)


def trained(model: Any, trainer: Any, normalizer: Any, pre: Any) -> Tokenizer:
    made = Tokenizer(model)
    if normalizer is not None:
        made.normalizer = normalizer
    if pre is not None:
        made.pre_tokenizer = pre
    rng = np.random.default_rng(1)
    made.train_from_iterator([text_of(rng, 300, odd=0) for _ in range(60)], trainer)
    return made


def bpe(normalizer: Any, pre: Any, alphabet: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    return trained(models.BPE(unk_token="<unk>", fuse_unk=True), trainer, normalizer, pre)


def unigram(normalizer: Any, pre: Any) -> Tokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False, max_piece_length=8
    )
    return trained(models.Unigram(), trainer, normalizer, pre)


def wordpiece() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    model = models.WordPiece(unk_token="<unk>", max_input_chars_per_word=30)
    return trained(model, trainer, normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer())


def _llama() -> Tokenizer:
    """Spaces are letters like others, and nothing parts words."""
    spaces = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    lines = pre_tokenizers.Split("\n", "isolated")  # of which the model makes bytes
    words = bpe(None, pre_tokenizers.Sequence([lines, pre_tokenizers.Metaspace(prepend_scheme="never")]), [])
    words.normalizer, words.pre_tokenizer = spaces, None  # type: ignore[assignment]
    return words


def _spanning() -> Tokenizer:
    """A token has the end of a word inside."""
    letters = {letter: i for i, letter in enumerate([*SPECIAL, "\u2581", *"abe7.,", "a\u2581", "a\u2581b"])}
    made = Tokenizer(models.BPE(letters, [("a", "\u2581"), ("a\u2581", "b")], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    return made


BYTES = pre_tokenizers.ByteLevel.alphabet()
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bert": wordpiece,
    "gpt2": lambda: bpe(None, pre_tokenizers.ByteLevel(add_prefix_space=False), BYTES),
    "llama3": lambda: bpe(
        None,
        pre_tokenizers.Sequence([
            pre_tokenizers.Split(LLAMA3, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        ]),
        BYTES,
    ),
    "llama2": _llama,
    "spanning": _spanning,
    "xlm-roberta": lambda: unigram(
        normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()]),
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
    ),
    "t5": lambda: unigram(
        normalizers.Sequence([normalizers.Replace("\n", " "), normalizers.NFKC()]), pre_tokenizers.Metaspace()
    ),
}  # fmt: skip


@cache
def tokenizer(kind: str) -> str:
    made = KINDS[kind]()
    made.add_tokens([AddedToken("New York", normalized=False), AddedToken("<mask>", lstrip=True, rstrip=True)])
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B </s>", [("<s>", 1), ("</s>", 2)])
    made.decoder = decoders.ByteLevel()
    return made.to_str()


def whole(encoder: FastEncoder) -> FastEncoder:
    """The same, of texts that are tokenized whole."""
    encoder._cutter.sizes = lambda room: [1 << 40]  # type: ignore[method-assign]
    return encoder


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_whole_text(kind: str, left: bool) -> None:
    rng = seeded()
    ours = FastEncoder(Tokenizer.from_str(tokenizer(kind)), from_left=left)
    reference = whole(FastEncoder(Tokenizer.from_str(tokenizer(kind)), from_left=left))
    assert ours._cutter._can_cut == (kind != "spanning")
    for limit in map(int, rng.integers(9, 16, 1 if kind == "spanning" else 2)):
        texts: list[Text] = [text_of(rng, int(rng.integers(200, 4000))) for _ in range(12)]
        # Short ones: the library makes all pairs of what is left over of two texts.
        texts += [(text_of(rng, int(rng.integers(1, 900))), text_of(rng, int(rng.integers(1, 900)))) for _ in range(4)]
        texts += ["ab" * 800, "\u4f60\u597d" * 500, " " * 900 + "a b", "a" + "\n" * 900 + "b"]
        for text, row, wanted in zip(texts, ours.encode(texts, limit), reference.encode(texts, limit), strict=True):
            assert row == wanted, (limit, text)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_most_of_a_long_text_is_not_read(left: bool) -> None:
    rng, read = seeded(), []
    encoder = FastEncoder(Tokenizer.from_str(tokenizer("gpt2")), from_left=left)
    tokenize = encoder._tokenize

    def counted(texts: Any) -> Any:
        read.extend(len(text) if isinstance(text, str) else len(text[1]) for text in texts)
        return tokenize(texts)

    encoder._tokenize = counted  # type: ignore[method-assign]
    long = text_of(rng, 200_000)
    encoder.encode([long, (long, long[5:])], 33)  # an even number beside the special tokens
    assert sum(read) < 20_000


def test_an_odd_token_is_the_longer_texts() -> None:
    encoder = FastEncoder(Tokenizer.from_str(tokenizer("gpt2")), from_left=False)
    reference = whole(FastEncoder(Tokenizer.from_str(tokenizer("gpt2")), from_left=False))
    few, many = "a " * 400, "aab7,\u3002 " * 100  # fewer characters, and more tokens
    for pair in ((few, many), (many, few), (few, few + "a"), (few + "a", few)):
        assert encoder.encode([pair], 10) == reference.encode([pair], 10)


@pytest.mark.parametrize("kind", ["gpt2", "spanning"])
def test_a_word_without_end_is_refused(kind: str) -> None:
    encoder = FastEncoder(Tokenizer.from_str(tokenizer(kind)), from_left=False)
    with pytest.raises(InputError, match=rf"has {MAX_CHARACTERS + 2} characters.* the limit") as caught:
        encoder.encode([" " * (MAX_CHARACTERS + 1) + "a"], 8)
    assert caught.value.hint


def test_sizes_grow_to_the_limit() -> None:
    cutter = Cutter(Tokenizer.from_str(tokenizer("bert")), from_left=False)
    for room in (1, 100, 1_000_000):
        sizes = cutter.sizes(room)
        assert sizes == sorted(sizes) and sizes[-1] >= MAX_CHARACTERS and sizes[0] < 50 * room + 200
