"""What the small files beside a model say about it: its tokenizer, its classes, how long a text it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimtab.compiler.data.preparation import transformer_config
from trimtab.compiler.task import Head, read_head
from trimtab.passes.errors import ModelError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json",
    "generation_config.json",
    "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
"""What of a model's folder a build keeps beside its tokenizer."""

_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)
_UNLIMITED = 1 << 20  # tokenizers say 1e30 for "no limit"


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ModelError: missing, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: cannot be read as JSON ({error})", hint="download or save the model again"
        ) from error


def optional_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or {} where there is no such file."""
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def tokenizer_folder(*folders: Path) -> Path | None:
    """The first of `folders` that holds a tokenizer."""
    return next((f for f in folders if any((f / name).is_file() for name in _VOCABULARIES)), None)


def class_labels(config: dict[str, Any]) -> tuple[str, ...] | None:
    """Names of the classes, by index, if `config` (a config.json) is of a classifier that names them."""
    names = config.get("id2label")
    if not isinstance(names, dict) or not str(*config.get("architectures") or [""]).endswith("Classification"):
        return None
    return tuple(str(names[key]) for key in sorted(names, key=int))


def model_head(config: dict[str, Any], folder: Path) -> Head:
    """What `config` (a config.json), and the file of sentence-transformers in `folder`, say of the model's logits."""
    return read_head(config, optional_json(folder / "config_sentence_transformers.json"))


def token_limit(folder: Path, config: dict[str, Any]) -> int | None:
    """The longest text that the model takes, in tokens: what its files say, as far as it has positions.

    sentence-transformers' own limit counts before the tokenizer's.
    """
    sentence = transformer_config(folder)
    options = sentence.get("tokenizer_args") or sentence.get("processor_kwargs") or {}
    said = (
        options.get("model_max_length"),
        sentence.get("max_seq_length"),
        optional_json(folder / "tokenizer_config.json").get("model_max_length"),
    )
    limits = [next((limit for limit in said if limit is not None), None), _positions(config)]
    known = [int(limit) for limit in limits if isinstance(limit, (int, float)) and 0 < limit < _UNLIMITED]
    return min(known, default=None)


def _positions(config: dict[str, Any]) -> int | None:
    limit = config.get("max_position_embeddings", config.get("n_positions"))
    if not isinstance(limit, int):
        return None
    # RoBERTa and its kin count positions from pad_token_id + 1, so that many rows of the table are never used.
    offset = config.get("pad_token_id", 1) + 1 if "roberta" in str(config.get("model_type")) else 0
    return limit - offset
