"""Texts → the input tensors of a transformer. Needs the `tokenizers` library alone, not transformers nor torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.compiler.data.encoding import Encoder, FastEncoder, SlowEncoder
from trimtab.compiler.data.preparation import TOKENIZER_CONFIG, Preparation, read_preparation, read_settings
from trimtab.compiler.data.texts import Text, checked_limit, checked_prompts, checked_texts
from trimtab.compiler.schema.json_text import mismatch
from trimtab.passes.errors import ModelError

_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of transformers that take tokenizer.json as it is."""

_BERT_SETTINGS = {
    "do_lower_case": "lowercase", "strip_accents": "strip_accents", "tokenize_chinese_chars": "handle_chinese_chars",
}  # fmt: skip
"""Key of tokenizer_config.json → attribute of the tokenizers library's BertNormalizer."""


@dataclass(frozen=True)
class Tokenizer:
    """A model's own tokenizer. Any number of threads may share it.

    Attributes:
        pad_id: token that fills short rows up; the attention mask is 0 there.
        max_tokens: the longest text that the model takes, special tokens included, or None.
        end_ids: tokens that end what the model generates.
        prompt: is put in front of each text, of a pair in front of the first; not in front of `prompts`.
    """

    pad_id: int
    max_tokens: int | None
    end_ids: frozenset[int]
    _encoder: Encoder
    prompt: str = ""

    def encode(
        self, texts: Sequence[Text], max_tokens: int | None = None, *, width: int | None = None
    ) -> dict[str, np.ndarray]:
        """Tokenize `texts`, cut to `max_tokens` each, and fill them up on the right to the longest.

        Args:
            texts: strings, or pairs of strings; of a pair, the longer text is cut first.
            max_tokens: the most tokens of a row, special tokens included.
            width: of each row, whatever the texts: they are cut there, and filled up to it.

        Returns:
            input_ids, attention_mask and token_type_ids, each [len(texts), longest], int64. A model may use only some.

        Raises:
            InputError: `texts` is no list of strings and pairs, or `max_tokens` leaves no room for a text's own tokens.
        """
        checked = [self._with_prompt(text) for text in checked_texts(texts)]
        limits = [limit for limit in (max_tokens, self.max_tokens, width) if limit is not None]
        special = self._encoder.special_tokens(any(isinstance(text, tuple) for text in checked))
        rows = self._encoder.encode(checked, min((checked_limit(limit, special) for limit in limits), default=None))
        shape = (len(rows), width or max((len(row.ids) for row in rows), default=0))
        ids, mask, types = np.full(shape, self.pad_id, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for i, row in enumerate(rows):
            filled = slice(len(row.ids))
            ids[i, filled], mask[i, filled], types[i, filled] = row.ids, 1, row.types
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}

    def _with_prompt(self, text: Text) -> Text:
        return self.prompt + text if isinstance(text, str) else (self.prompt + text[0], text[1])

    def prompt_tokens(self) -> int:
        """How many tokens at the beginning of a row are the prompt's; the special tokens in front of it count."""
        if not self.prompt:
            return 0
        ids = self._encoder.encode([self.prompt], self.max_tokens)[0].ids
        return len(ids) - (bool(ids) and ids[-1] in self._encoder.special_ids())

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts to go on from: none is cut, and none ends with a token that ends texts.

        Raises:
            InputError: `texts` is no list of strings.
        """
        prompts = [list(row.ids) for row in self._encoder.encode(checked_prompts(texts), None)]
        for ids in prompts:
            while ids and ids[-1] in self.end_ids:
                ids.pop()
        return prompts

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return self._encoder.decode(ids)


def load_tokenizer(folder: Path | str, max_tokens: int | None = None) -> Tokenizer:
    """Read the tokenizer in `folder`: tokenizer.json, or what transformers can read if it is installed.

    Args:
        folder: of the model.
        max_tokens: the longest text that the model takes.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    folder = Path(folder)
    preparation = read_preparation(folder)
    if (folder / "tokenizer.json").is_file():
        return _load_json(folder, max_tokens, preparation)
    return _load_with_transformers(folder, max_tokens, preparation)


def _load_json(folder: Path, max_tokens: int | None, preparation: Preparation) -> Tokenizer:
    import tokenizers

    path = folder / "tokenizer.json"
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise ModelError(
            f"{path}: not a tokenizer ({error})", hint="save the model with its tokenizer again"
        ) from error
    settings = read_settings(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    _follow_settings(inner, settings)
    side = settings.get("truncation_side", (inner.truncation or {}).get("direction"))
    pad, ends = _pad_id(folder, inner.token_to_id), _end_ids(folder, inner.token_to_id)
    encoder = FastEncoder(inner, from_left=side == "left", lower_case=preparation.lower_case)
    return Tokenizer(pad, max_tokens, ends, encoder, preparation.prompt)


def _follow_settings(inner: Any, settings: dict[str, Any]) -> None:
    """Let tokenizer_config.json overrule the normalizer of BERT and its kin, as their classes in transformers do."""
    from tokenizers import normalizers

    normalizer = inner.normalizer
    if not isinstance(normalizer, normalizers.BertNormalizer) or settings.get("tokenizer_class") in _GENERIC:
        return
    for key, name in _BERT_SETTINGS.items():
        if settings.get(key) is not None or (key == "strip_accents" and key in settings):  # its null has a meaning
            setattr(normalizer, name, settings[key])
    inner.normalizer = normalizer


def _pad_id(folder: Path, token_to_id: Callable[[str], int | None]) -> int:
    """The padding token; else the end of text, as is usual for models without one; else 0. The mask hides it anyway."""
    settings = read_settings(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    for key in ("pad_token", "eos_token"):
        token = settings.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        found = token_to_id(text) if isinstance(text, str) else None
        if found is not None:
            return found
    number = read_settings(folder / "config.json", {}).get("pad_token_id")
    return number if isinstance(number, int) and 0 <= number < 1 << 31 else 0


def _end_ids(folder: Path, token_to_id: Callable[[str], int | None]) -> frozenset[int]:
    """Tokens that end what a model generates, by the first of the model's files that names any."""
    for name in ("generation_config.json", "config.json"):
        ends = read_settings(folder / name, {}).get("eos_token_id")
        if ends is not None:
            ends = ends if isinstance(ends, list) else [ends]
            if (wrong := mismatch(ends, [int])) is not None:
                raise ModelError(f"{folder / name}: eos_token_id{wrong}", hint="give the numbers of tokens")
            return frozenset(ends)
    token = read_settings(folder / "tokenizer_config.json", TOKENIZER_CONFIG).get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    number = token_to_id(text) if isinstance(text, str) else None
    return frozenset() if number is None else frozenset([number])


def _load_with_transformers(folder: Path, max_tokens: int | None, preparation: Preparation) -> Tokenizer:
    hint = "save the tokenizer beside the model (`AutoTokenizer.from_pretrained(...).save_pretrained(DIR)`)"
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ModelError(f"{folder}: no tokenizer.json, and transformers is not installed", hint=hint) from error
    try:
        inner = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{folder}: no tokenizer that transformers can read ({reason})", hint=hint) from error

    backend = getattr(inner, "backend_tokenizer", None)
    encoder: Encoder = SlowEncoder(inner)
    if backend is not None:
        encoder = FastEncoder(backend, from_left=inner.truncation_side == "left", lower_case=preparation.lower_case)
    elif preparation.lower_case:
        raise ModelError(f"{folder}: wants texts in lower case, which needs a fast tokenizer", hint=hint)
    pad = inner.pad_token_id if inner.pad_token_id is not None else inner.eos_token_id
    ends = _end_ids(folder, inner.get_vocab().get)
    return Tokenizer(pad or 0, max_tokens, ends, encoder, preparation.prompt)
