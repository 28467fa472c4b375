"""What happens to texts before their tokenizer: sentence-transformers may want lower case, and a prompt in front."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimtab.passes.errors import ModelError

FILE = "texts.json"
"""Holds a `Preparation` beside the tokenizer of a build."""

TRANSFORMER_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Names that sentence-transformers gave to the configuration of its Transformer module; the first that says anything
counts."""

_ALWAYS = {"SentenceTransformer": ("query", "document")}
"""Prompts that a model has though its files do not name them; they are empty."""


@dataclass(frozen=True)
class Preparation:
    """What is done to a text.

    Attributes:
        lower_case: letters become lower case, as the first step of the tokenizer's normalizer.
        prompt: is put in front; of a pair, in front of the first text.
    """

    lower_case: bool = False
    prompt: str = ""

    def write(self, folder: Path) -> None:
        """Keep it beside the tokenizer in `folder`, if there is anything to keep."""
        if self != Preparation():
            (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_preparation(folder: Path) -> Preparation:
    """What the tokenizer's `folder` wants: by its own `FILE`, else by the sentence-transformers folder that it is in.

    Raises:
        ModelError: a file is damaged, or names a default prompt that it does not have.
    """
    own = read_settings(folder / FILE)
    if own:
        return Preparation(own.get("lower_case") is True, str(own.get("prompt", "")))
    roots = (root for root in (folder, folder.parent) if (root / "modules.json").is_file())
    for root in roots:
        transformer = root / _transformer_path(root / "modules.json")
        if folder.resolve() in (root.resolve(), transformer.resolve()):
            lower = transformer_config(transformer).get("do_lower_case")
            return Preparation(bool(lower), _default_prompt(root / "config_sentence_transformers.json"))
    return Preparation()


def transformer_config(folder: Path) -> dict[str, Any]:
    """The configuration of the Transformer module in `folder`; {} where there is none."""
    return next((config for name in TRANSFORMER_CONFIGS if (config := read_settings(folder / name))), {})


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no such file.

    Raises:
        ModelError: not JSON.
    """
    content = _read(path)
    return content if isinstance(content, dict) else {}


def _read(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not JSON ({error})", hint="save the model with its tokenizer again") from error


def _transformer_path(modules: Path) -> str:
    """Where modules.json says that the transformer is, below its folder."""
    listed = _read(modules)
    for module in listed if isinstance(listed, list) else []:
        if isinstance(module, dict) and str(module.get("type")).rpartition(".")[2] == "Transformer":
            return str(module.get("path", ""))
    return ""


def _default_prompt(path: Path) -> str:
    config = read_settings(path)
    name, prompts = config.get("default_prompt_name"), config.get("prompts") or {}
    if name is None:
        return ""
    always = _ALWAYS.get(config.get("model_type", "SentenceTransformer"), ())
    prompt = prompts.get(name, "" if name in always else None) if isinstance(prompts, dict) else None
    if not isinstance(prompt, str) and not (prompt is None and name in prompts):
        raise ModelError(
            f"{path}: default_prompt_name is {name!r}, and there is no such prompt", hint="name one of its prompts"
        )
    return prompt or ""
