"""Texts → the input tensors of a transformer. tokenizer.json needs neither transformers nor torch."""

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
from trimtab.passes.errors import InputError, ModelError
from trimtab.passes.optional import import_optional

_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Tokenizer classes of transformers that use tokenizer.json unchanged."""

_BERT_SETTINGS = {
    "do_lower_case": "lowercase", "strip_accents": "strip_accents", "tokenize_chinese_chars": "handle_chinese_chars",
}  # fmt: skip
"""Key of tokenizer_config.json → attribute of the tokenizers library's BertNormalizer."""


@dataclass(frozen=True)
class Tokenizer:
    """A model's own tokenizer. Any number of threads may share it.

    Attributes:
        pad_id: token that pads short rows; the attention mask is 0 there.
        max_tokens: maximum tokens of a text, special tokens included, or None if there is no limit.
        end_ids: tokens that end generation.
        prompt: text that `encode` puts in front of each text, or of the first text of a pair.
    """

    pad_id: int
    max_tokens: int | None
    end_ids: frozenset[int]
    _encoder: Encoder
    prompt: str = ""

    def encode(
        self, texts: Sequence[Text], max_tokens: int | None = None, *, width: int | None = None
    ) -> dict[str, np.ndarray]:
        """Tokenize `texts`, cut each to `max_tokens`, and pad them on the right to the longest.

        Args:
            texts: strings, or pairs of strings; the longer text of a pair is cut first.
            max_tokens: maximum tokens of a row, special tokens included.
            width: fixed number of tokens of each row: longer texts are cut to it, and shorter ones padded.

        Returns:
            input_ids, attention_mask and token_type_ids, each [len(texts), longest], int64. A model may use only some.

        Raises:
            InputError: `texts` is no list of strings and pairs, or `max_tokens` leaves no room for a text's own tokens.
        """
        checked = [self._with_prompt(text) for text in checked_texts(texts)]
        limits = [limit for limit in (max_tokens, self.max_tokens, width) if limit is not None]
        special = self._encoder.special_tokens(any(isinstance(text, tuple) for text in checked))
        rows = self._encoder.encode(checked, min((checked_limit(limit, special) for limit in limits), default=None))
        # No texts have one token each, not none: engines take batches of no rows, but no rows of no tokens.
        shape = (len(rows), width or max((len(row.ids) for row in rows), default=1))
        ids, mask, types = np.full(shape, self.pad_id, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for i, row in enumerate(rows):
            filled = slice(len(row.ids))
            ids[i, filled], mask[i, filled], types[i, filled] = row.ids, 1, row.types
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}

    def _with_prompt(self, text: Text) -> Text:
        return self.prompt + text if isinstance(text, str) else (self.prompt + text[0], text[1])

    def prompt_tokens(self) -> int:
        """Number of tokens at the beginning of a row that belong to the prompt, with the special tokens before it."""
        if not self.prompt:
            return 0
        ids = self._encoder.encode([self.prompt], self.max_tokens)[0].ids
        return len(ids) - (bool(ids) and ids[-1] in self._encoder.special_ids())

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that generation continues. No text is cut, and trailing tokens of `end_ids` are removed.

        Raises:
            InputError: `texts` is no list of strings, or a text has more than `max_tokens` tokens.
        """
        checked, context, limit = checked_prompts(texts), self.max_tokens, None
        if context is not None:  # of a text over the limit, no more is tokenized than shows that it is too long
            limit = context + 1 + self._encoder.special_tokens(False)
        prompts = [list(row.ids) for row in self._encoder.encode(checked, limit)]
        for ids in prompts:
            whole = limit is None or len(ids) < limit  # otherwise end tokens at its end may be of the text's middle
            while whole and ids and ids[-1] in self.end_ids:
                ids.pop()
            if context is not None and len(ids) > context:
                raise InputError(
                    f"a prompt has more than {context} tokens, and the model takes {context} with its answer",
                    hint="shorten it",
                )
        return prompts

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._encoder.decode(ids)


def load_tokenizer(folder: Path | str, max_tokens: int | None = None) -> Tokenizer:
    """Read the tokenizer in `folder`: tokenizer.json, or other files if transformers is installed and can read them.

    Args:
        folder: folder of the model.
        max_tokens: maximum tokens of a text that the model takes.

    Raises:
        ModelError: the folder has no tokenizer, or the tokenizer is damaged.
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
    """Apply tokenizer_config.json to the normalizer of BERT and its relatives, as their transformers classes do."""
    from tokenizers import normalizers

    normalizer = inner.normalizer
    if not isinstance(normalizer, normalizers.BertNormalizer) or settings.get("tokenizer_class") in _GENERIC:
        return
    for key, name in _BERT_SETTINGS.items():
        if settings.get(key) is not None or (key == "strip_accents" and key in settings):  # its null has a meaning
            setattr(normalizer, name, settings[key])
    inner.normalizer = normalizer


def _pad_id(folder: Path, token_to_id: Callable[[str], int | None]) -> int:
    """The padding token, else the end-of-text token, else 0. The attention mask hides padding in any case."""
    settings = read_settings(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    for key in ("pad_token", "eos_token"):
        token = settings.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        pad_id = token_to_id(text) if isinstance(text, str) else None
        if pad_id is not None:
            return pad_id
    number = read_settings(folder / "config.json", {}).get("pad_token_id")
    return number if isinstance(number, int) and 0 <= number < 1 << 31 else 0


def _end_ids(folder: Path, token_to_id: Callable[[str], int | None]) -> frozenset[int]:
    """Tokens that end generation, from the first of the model's files that names any."""
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
    what = f"the tokenizer in {folder}, which has no tokenizer.json,"
    transformers = import_optional("transformers", ModelError, what=what, extra="huggingface")
    try:
        inner = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{folder}: no tokenizer that transformers can read ({reason})", hint=hint) from error

    backend = getattr(inner, "backend_tokenizer", None)
    encoder: Encoder = SlowEncoder(inner)
    if backend is not None:
        encoder = FastEncoder(backend, from_left=inner.truncation_side == "left", lower_case=preparation.lower_case)
    elif preparation.lower_case:
        raise ModelError(f"{folder}: needs texts in lower case, which only a fast tokenizer provides", hint=hint)
    pad = inner.pad_token_id if inner.pad_token_id is not None else inner.eos_token_id
    ends = _end_ids(folder, inner.get_vocab().get)
    return Tokenizer(pad or 0, max_tokens, ends, encoder, preparation.prompt)
