"""`python -m trimtab.compiler.sources.architecture FOLDER OUT`: finds a model's class if config.json names none.

transformers has one class per task for a model type. Each class is instantiated without weights, and the names of its
weights are compared with those in the folder: the model's class is the one with exactly the same names.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers.models.auto import modeling_auto as auto

from trimtab.compiler.sources.child import report
from trimtab.compiler.sources.config import load_config
from trimtab.passes.errors import ModelError

_RESULT_FILE = "architecture.json"
_HEADS = (
    "FOR_SEQUENCE_CLASSIFICATION_", "FOR_TOKEN_CLASSIFICATION_", "FOR_QUESTION_ANSWERING_", "FOR_MASKED_LM_",
    "FOR_CAUSAL_LM_", "FOR_IMAGE_CLASSIFICATION_", "",
)  # fmt: skip
"""Name parts of transformers' tables (model type → class), one for each task that is exported."""
_BUFFERS = ("position_ids", "inv_freq", "attn.bias", "attn.masked_bias", "token_type_ids")
"""Name ends of buffers that older versions of transformers saved, and that are no weights."""


def find_architecture(folder: Path) -> str:
    """Find the name of the transformers class of the model in `folder`.

    Raises:
        ModelError: transformers does not know the model type, or the weights do not fit exactly one class.
    """
    config = load_config(folder)
    names = set(_weight_names(sorted(folder.glob("*.safetensors"))))
    classes = list(_classes(config))
    # transformers renames some weights while it loads a file. Only loading all weights shows the final names.
    fitting = [model_class for model_class in classes if _fits(model_class, config, names)] or [
        model_class for model_class in classes if _loads(model_class, folder)
    ]
    if len(fitting) != 1:
        which = " and ".join(model_class.__name__ for model_class in fitting) or "no class"
        raise ModelError(
            f"config.json names no architecture, and its weights fit {which} of the model type {config.model_type}",
            hint='add the class of the model to config.json, such as "architectures": ["BertModel"]',
        )
    return str(fitting[0].__name__)


def _classes(config: Any) -> Iterator[Any]:
    tables = {head: getattr(auto, f"MODEL_{head}MAPPING_NAMES") for head in _HEADS}
    if config.model_type in tables["FOR_MASKED_LM_"]:  # its causal and its masked LM have the same weights
        del tables["FOR_MASKED_LM_" if getattr(config, "is_decoder", False) else "FOR_CAUSAL_LM_"]
    for table in tables.values():
        name = table.get(config.model_type)
        model_class = getattr(transformers, name, None) if isinstance(name, str) else None
        if model_class is not None:
            yield model_class


def _fits(model_class: Any, config: Any, names: set[str]) -> bool:
    try:
        with torch.device("meta"):
            model = model_class(config)
    except Exception:  # any: a class may need options that the config lacks
        return False
    expected = set(model.state_dict())
    tied = {name for pair in (getattr(model, "all_tied_weights_keys", None) or {}).items() for name in pair}
    return _same(model_class, expected - names - tied, names - expected)


def _loads(model_class: Any, folder: Path) -> bool:
    options = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    try:
        _, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    except Exception:  # any, as above
        return False
    return _same(model_class, info["missing_keys"], info["unexpected_keys"])


def _same(model_class: Any, missing: Iterable[str], unexpected: Iterable[str]) -> bool:
    """Whether no needed weight is missing and no weight is unexpected. A class that returns states needs no pooler."""
    without_head = model_class.__name__.endswith("Model")
    lacks = any(not (without_head and "pooler." in name) for name in missing)
    return not lacks and all(name.endswith(_BUFFERS) for name in unexpected)


def _weight_names(files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        with safe_open(file, framework="pt") as opened:
            yield from opened.keys()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    return report(
        options.out,
        lambda: (options.out / _RESULT_FILE).write_text(json.dumps(find_architecture(options.folder))) and None,
    )


if __name__ == "__main__":
    raise SystemExit(main())
