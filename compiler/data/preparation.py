"""Preparation of texts before they are tokenized: a sentence-transformers model may need lower case and a prompt."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimtab.compiler.schema.json_text import Schema, optional_json, read_json
from trimtab.passes.errors import ModelError

FILE = "texts.json"
"""File beside the tokenizer of a build that stores a `Preparation`."""

TRANSFORMER_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""File names that versions of sentence-transformers use for the configuration of the Transformer module. The first file
that is not empty counts."""

TOKENIZER_CONFIG: Schema = {
    "model_max_length": float, "tokenizer_class": str, "truncation_side": str, "do_lower_case": bool,
    "strip_accents": bool, "tokenize_chinese_chars": bool,
}  # fmt: skip
"""The keys of tokenizer_config.json that trimtab reads."""

MODULES: Schema = [{"type": str, "path": str}]
"""The keys of modules.json that trimtab reads."""

SENTENCE_CONFIG: Schema = {"model_type": str, "default_prompt_name": str, "prompts": {}, "truncate_dim": int}
"""The keys of config_sentence_transformers.json that trimtab reads."""

_TRANSFORMER: Schema = {
    "do_lower_case": bool, "max_seq_length": float, "transformer_task": str, "processing_kwargs": {},
    "modality_config": {}, "model_args": {}, "model_kwargs": {}, "tokenizer_args": {}, "processor_kwargs": {},
    "config_args": {}, "config_kwargs": {},
}  # fmt: skip
_PREPARATION: Schema = {"lower_case": bool, "prompt": str}

_ALWAYS = {"SentenceTransformer": ("query", "document")}
"""model_type → prompts that exist even if the files do not list them. These prompts are empty."""


@dataclass(frozen=True)
class Preparation:
    """How a text is changed before it is tokenized.

    Attributes:
        lower_case: letters become lower case, as the first step of the tokenizer's normalizer.
        prompt: text that is put in front of a text, or of the first text of a pair.
    """

    lower_case: bool = False
    prompt: str = ""

    def write(self, folder: Path) -> None:
        """Store the preparation beside the tokenizer in `folder`, unless it changes nothing."""
        if self != Preparation():
            (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_preparation(folder: Path) -> Preparation:
    """Read the preparation for the tokenizer in `folder` from `FILE`, or else from its sentence-transformers folder.

    Raises:
        ModelError: a file is damaged, or names a default prompt that it does not have.
    """
    own = read_settings(folder / FILE, _PREPARATION)
    if own:
        return Preparation(own.get("lower_case") is True, own.get("prompt") or "")
    roots = (root for root in (folder, folder.parent) if (root / "modules.json").is_file())
    for root in roots:
        transformer = root / _transformer_path(root / "modules.json")
        if folder.resolve() in (root.resolve(), transformer.resolve()):
            lower = transformer_config(transformer).get("do_lower_case")
            return Preparation(bool(lower), _default_prompt(root / "config_sentence_transformers.json"))
    return Preparation()


def transformer_config(folder: Path) -> dict[str, Any]:
    """The configuration of the Transformer module in `folder`; {} where there is none."""
    return next((config for name in TRANSFORMER_CONFIGS if (config := read_settings(folder / name, _TRANSFORMER))), {})


def read_settings(path: Path, schema: Schema) -> dict[str, Any]:
    """Read a JSON file beside the tokenizer; {} where there is no such file.

    Raises:
        ModelError: the file is not JSON, or does not follow `schema`.
    """
    settings: dict[str, Any] = optional_json(path, ModelError, schema, hint="save the model with its tokenizer again")
    return settings


def _transformer_path(modules: Path) -> str:
    """Path of the transformer in modules.json, relative to its folder; "" if there is none."""
    for module in read_json(modules, ModelError, MODULES):
        if (module.get("type") or "").rpartition(".")[2] == "Transformer":
            return str(module.get("path") or "")
    return ""


def _default_prompt(path: Path) -> str:
    config = read_settings(path, SENTENCE_CONFIG)
    name, prompts = config.get("default_prompt_name"), config.get("prompts") or {}
    if name is None:
        return ""
    always = _ALWAYS.get(config.get("model_type", "SentenceTransformer"), ())
    prompt = prompts.get(name, "" if name in always else None)
    if not isinstance(prompt, str) and not (prompt is None and name in prompts):
        raise ModelError(
            f"{path}: default_prompt_name is {name!r}, and there is no such prompt", hint="name one of its prompts"
        )
    return prompt or ""
