"""Texts and pairs are cut and typed as transformers does it, whatever the post-processor, and from any thread."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from seeds import seeded
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from trimtab.compiler.data.encoding import FastEncoder, SlowEncoder
from trimtab.compiler.data.texts import Text
from trimtab.compiler.data.tokenizer import load_tokenizer
from trimtab.passes.errors import InputError

transformers = pytest.importorskip("transformers")

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
IDS = [("<s>", 1), ("</s>", 2)]
PROCESSORS: dict[str, Any] = {
    "bert": processors.BertProcessing(("</s>", 2), ("<s>", 1)),
    "bert-template": processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B:1 </s>:1", IDS),
    "roberta": processors.RobertaProcessing(("</s>", 2), ("<s>", 1)),
    "xlm-roberta": processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> </s> $B </s>", IDS),
    "gpt2": processors.ByteLevel(trim_offsets=False),
    "llama": processors.Sequence([
        processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing("<s> $A", "<s> $A <s>:1 $B:1", IDS),
    ]),
    "t5": processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", IDS),
    "none": None,
}  # fmt: skip
BYTES = ("roberta", "gpt2", "llama")


def _tokenizer(kind: str, folder: Path, **options: Any) -> Any:
    """One of words, or of single bytes, saved into `folder` by transformers."""
    if kind in BYTES:
        letters = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
        inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        words = SPECIAL + [f"w{i}" for i in range(60)]
        inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if PROCESSORS[kind] is not None:
        inner.post_processor = PROCESSORS[kind]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", **options
    )
    tokenizer._tokenizer.post_processor = inner.post_processor  # transformers puts one of its own in place of none
    tokenizer.save_pretrained(folder)
    return tokenizer


def _texts(rng: np.random.Generator, count: int, pairs: bool) -> list[Text]:
    def text() -> str:
        extra = ["é", "zzz", "</s>"] if rng.random() < 0.2 else []
        return " ".join([*(f"w{i}" for i in rng.integers(0, 60, rng.integers(0, 12))), *extra])

    return [(text(), text()) if pairs and rng.random() < 0.8 else text() for _ in range(count)]


def _expected(tokenizer: Any, text: Text, limit: int | None) -> tuple[list[int], list[int]]:
    first, second = ([text], None) if isinstance(text, str) else ([text[0]], [text[1]])
    options = {"truncation": limit is not None, "max_length": limit, "return_token_type_ids": True}
    rows = tokenizer(first, second, **options)
    return rows["input_ids"][0], rows["token_type_ids"][0]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", PROCESSORS)
def test_like_transformers(kind: str, side: str, tmp_path: Path) -> None:
    seed = int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    rng, reference = np.random.default_rng(seed), _tokenizer(kind, tmp_path, truncation_side=side)
    ours = load_tokenizer(tmp_path)
    for limit in (None, *(int(i) for i in rng.integers(5, 30, 6))):
        texts = _texts(rng, 12, pairs=True)
        feeds = ours.encode(texts, limit)
        for row, text in enumerate(texts):
            ids, types = _expected(reference, text, limit)
            real = feeds["attention_mask"][row] == 1
            assert real[: len(ids)].all() and not real[len(ids) :].any()
            assert feeds["input_ids"][row, real].tolist() == ids, (text, limit)
            assert feeds["token_type_ids"][row, real].tolist() == types, (text, limit)
            assert not feeds["token_type_ids"][row, ~real].any() and not feeds["input_ids"][row, ~real].any()


def test_least_room(tmp_path: Path) -> None:
    _tokenizer("xlm-roberta", tmp_path)
    ours = load_tokenizer(tmp_path)
    assert ours.encode(["w0 w1"], 3)["input_ids"].tolist() == [[1, 4, 2]]
    assert ours.encode([("w0", "w1 w2")], 5)["input_ids"].tolist() == [[1, 2, 2, 5, 2]]
    for texts, limit, least in ((["w0"], 2, 3), ([("w0", "w1")], 4, 5), (["w0", ("w0", "w1")], 4, 5)):
        with pytest.raises(InputError, match=f"max_tokens is {limit}, and .* give at least {least}"):
            ours.encode(texts, limit)
    assert ours.encode(["w0 w1"], np.int64(3))["input_ids"].shape == (1, 3)


@pytest.mark.parametrize("limit", [0, -1, 2.0, 2.5, "8", True])
def test_limits_that_are_none(limit: Any, word_tokenizer: Path) -> None:
    with pytest.raises(InputError, match=r"max_tokens is .*of at least 1|max_tokens is .*give at least 1"):
        load_tokenizer(word_tokenizer).encode(["w0"], limit)


@pytest.mark.parametrize(
    ("texts", "wrong"),
    [
        ("w0 w1", "a string, not a list"),
        (b"w0", "of type bytes"),
        (None, "None, not a list"),
        (7, "of type int"),
        ({"text": "w0"}, "of type dict"),
        ([None], "text 0 is None"),
        (["w0", b"w1"], "text 1 is of type bytes.*decode"),
        (["w0", 1.5], "text 1 is of type float"),
        ([()], "text 0 is of type tuple of 0"),
        ([("w0",)], "tuple of 1"),
        ([("w0", "w1", "w2")], "tuple of 3"),
        ([("w0", None)], "text 0 is a pair with None"),
        ([["w0", b"w1"]], "a pair with of type bytes|a pair with .*bytes"),
        (["w0", "w\ud800"], r"text 1 holds half a character \(U\+D800\) at 1"),
        ([("w0", "\udfff")], "half a character"),
    ],
)
def test_texts_that_are_none(texts: Any, wrong: str, word_tokenizer: Path) -> None:
    with pytest.raises(InputError, match=wrong):
        load_tokenizer(word_tokenizer).encode(texts)


def test_what_lists_of_texts_may_be(word_tokenizer: Path) -> None:
    ours = load_tokenizer(word_tokenizer)
    wanted = ours.encode(["w0", "w1 w2"])["input_ids"]
    for texts in (("w0", "w1 w2"), np.array(["w0", "w1 w2"]), iter(["w0", "w1 w2"])):
        np.testing.assert_array_equal(ours.encode(texts)["input_ids"], wanted)
    assert ours.encode([["w0", "w1"]])["token_type_ids"].tolist() == [[0, 1]]
    assert ours.encode([])["input_ids"].shape == (0, 1)
    for prompts in ("w0 w1", [("w0", "w1")]):
        with pytest.raises(InputError):
            ours.prompts(prompts)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
def test_prompts_end_at_the_context(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tokenizer(kind, tmp_path)
    whole, context = load_tokenizer(tmp_path), int(seeded().integers(9, 30))
    ours, sizes = load_tokenizer(tmp_path, context), []
    tokenize = FastEncoder._tokenize
    monkeypatch.setattr(FastEncoder, "_tokenize", lambda self, texts: sizes.extend(texts) or tokenize(self, texts))
    for count in range(1, context + 4):
        text = "a" * count if kind in BYTES else " ".join(["w7"] * count)
        (ids,) = whole.prompts([text])
        if len(ids) <= context:
            assert ours.prompts([text]) == [ids]
        else:
            with pytest.raises(InputError, match=f"more than {context} tokens, and the model takes {context}"):
                ours.prompts(["w1", text])
    sizes.clear()
    for text in ("w7 " * 20_000, "w1 " + "</s> " * 20_000 + " w2"):  # end tokens in the middle are not the end
        with pytest.raises(InputError, match=f"more than {context} tokens"):
            ours.prompts([text])
    assert max(map(len, sizes)) < 10_000


def test_a_tokenizer_that_does_not_know_a_word(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"w0": 0})).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="cannot read a text"):
        load_tokenizer(tmp_path).encode(["zzz"])


@pytest.mark.parametrize("kind", ["roberta", "bert", "slow"])
def test_threads_get_their_own_texts(kind: str, tmp_path: Path) -> None:
    if kind == "slow":
        reference: Any = transformers.CTRLTokenizer(*_ctrl_files(tmp_path), unk_token="<unk>")
        reference.save_pretrained(tmp_path)
    else:
        reference = _tokenizer(kind, tmp_path)
    ours, rng = load_tokenizer(tmp_path), np.random.default_rng(5)
    assert type(ours._encoder) is (SlowEncoder if kind == "slow" else FastEncoder)
    cases = [(text, limit) for text in _texts(rng, 12, pairs=True) for limit in (None, 6, 9, 14)]
    wanted = [_expected(reference, text, limit) for text, limit in cases]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def work(seed: int) -> int:
        wrong = 0
        for i in np.random.default_rng(seed).integers(0, len(cases), 150):
            feeds = ours.encode([cases[i][0]], cases[i][1])
            wrong += (feeds["input_ids"][0].tolist(), feeds["token_type_ids"][0].tolist()) != wanted[i]
        return wrong

    try:
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(work, range(8))) == 0
    finally:
        sys.setswitchinterval(interval)


def _ctrl_files(folder: Path) -> tuple[str, str]:
    """Files of a tokenizer that transformers has in Python alone."""
    (folder / "vocab.json").write_text('{"<unk>": 0, "w</w>": 1, "w@@": 2, "1</w>": 3}')
    (folder / "merges.txt").write_text("#version: 0.2\nw </w>\n")
    return str(folder / "vocab.json"), str(folder / "merges.txt")


@pytest.mark.parametrize("kind", ["BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
def test_lower_case_by_the_settings_of_a_bert(wanted: bool, saved: bool, kind: str | None, tmp_path: Path) -> None:
    """transformers lets tokenizer_config.json overrule tokenizer.json, but not where the class is a general one."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "Hello", "e", "\u00c9", "world"]
    inner = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=saved)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    inner.save(str(tmp_path / "tokenizer.json"))
    settings = {"do_lower_case": wanted} | ({"tokenizer_class": kind} if kind else {})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    text = "Hello \u00c9 world"
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path)([text])["input_ids"]
    assert load_tokenizer(tmp_path).encode([text])["input_ids"].tolist() == expected
