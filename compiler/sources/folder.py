"""Reads facts about a model from the small files beside it: tokenizer, class names, and maximum text length."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trimtab.compiler.data.preparation import SENTENCE_CONFIG, TOKENIZER_CONFIG, transformer_config
from trimtab.compiler.schema.json_text import AGAIN, Schema, optional_json, read_json
from trimtab.compiler.task import Head, read_head
from trimtab.passes.errors import ModelError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json",
    "generation_config.json",
    "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
"""Files of a model's folder that a build copies for its tokenizer."""

_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)
_BEHIND_PADDING = frozenset({
    "camembert", "data2vec-text", "ibert", "lilt", "longformer", "luke", "markuplm", "roberta", "roberta-prelayernorm",
    "xlm-roberta", "xlm-roberta-xl", "xmod",
})  # fmt: skip
"""Model types whose positions start at pad_token_id + 1, so that this many rows of the position table are never used.
MPNet's positions always start at 2."""

_UNLIMITED = 1 << 20  # tokenizers without a limit have one of 1e30


_CONFIG: Schema = {
    "architectures": [str], "auto_map": {}, "id2label": {}, "model_type": str, "quantization_config": {},
}  # fmt: skip
"""The keys of config.json that decide how a model is read."""


def read_config(path: Path) -> dict[str, Any]:
    """Read the model's configuration in config.json.

    Raises:
        ModelError: the file is missing or not JSON, or a key that trimtab reads has a value of another kind.
    """
    config: dict[str, Any] = read_json(path, ModelError, _CONFIG)
    for key in config.get("id2label") or {}:
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise ModelError(f"{path}: id2label has the key {key[:40]!r}, which is no number of a class", hint=AGAIN)
    return config


def optional_config(folder: Path) -> dict[str, Any]:
    """Read the configuration in `folder`; {} where there is none."""
    path = folder / "config.json"
    return read_config(path) if os.path.isfile(path) else {}


def tokenizer_folder(*folders: Path) -> Path | None:
    """The first of `folders` that holds a tokenizer."""
    return next((f for f in folders if any(os.path.isfile(f / name) for name in _VOCABULARIES)), None)


def architecture(config: dict[str, Any]) -> str:
    """The class of transformers that `config` (a config.json) names first; "" where it names none."""
    names = config.get("architectures") or [""]
    return str(names[0])


def class_labels(config: dict[str, Any]) -> tuple[str, ...] | None:
    """Names of the classes, by index; None unless `config` (a config.json) belongs to a classifier that names them."""
    names = config.get("id2label")
    if not names or not architecture(config).endswith("Classification"):
        return None
    return tuple(str(names[key]) for key in sorted(names, key=int))


def model_head(config: dict[str, Any], folder: Path) -> Head:
    """The kind of the model's logits, from `config` (a config.json) and sentence-transformers' file in `folder`."""
    return read_head(config, optional_json(folder / "config_sentence_transformers.json", ModelError, SENTENCE_CONFIG))


def token_limit(folder: Path, config: dict[str, Any]) -> int | None:
    """Maximum tokens of a text: the limit in the model's files, or its number of positions if that is smaller.

    A limit of sentence-transformers takes precedence over the tokenizer's.
    """
    sentence = transformer_config(folder)
    options = sentence.get("tokenizer_args") or sentence.get("processor_kwargs") or {}
    candidates = (
        options.get("model_max_length"),
        sentence.get("max_seq_length"),
        optional_json(folder / "tokenizer_config.json", ModelError, TOKENIZER_CONFIG).get("model_max_length"),
    )
    limits = [next((limit for limit in candidates if limit is not None), None), _positions(config)]
    finite = [int(limit) for limit in limits if isinstance(limit, (int, float)) and 1 <= limit < _UNLIMITED]
    return min(finite, default=None)


def _positions(config: dict[str, Any]) -> int | None:
    limit = config.get("max_position_embeddings", config.get("n_positions"))
    if not isinstance(limit, int):
        return None
    kind, padding = config.get("model_type"), config.get("pad_token_id")
    if kind == "mpnet":
        return limit - 2
    if kind in _BEHIND_PADDING:
        return limit - (padding if isinstance(padding, int) else 1) - 1
    return limit
